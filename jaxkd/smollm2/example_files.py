"""Files of examples: JSONL (one object a line) and Parquet (the same columns), or a folder of either.

They are in the formats of TRL:

    prompt-only       {"prompt"}
    completion        {"prompt", "completion"}
    preference        {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} that begin with the same prompt

standard (every value a string) or conversational (every value a list of {"role", "content"}). Three more columns, those
of the samples that `corpus` writes, count beside strings: with {"prompt_ids", "completion_ids"} these tokens are taken
as they are, for a text that was decoded need not give its own tokens again, and {"finished": false} says that no end is
to be added. All others are ignored. Inside there is one schema, `Example`: plain strings, with the chat template
applied already.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxkd.smollm2.chat import apply_chat_template
from jaxkd.smollm2.json_file import shown
from jaxkd.smollm2.tokenization import Tokenizer


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
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object, got {type(row).__name__}")
        yield row


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        try:
            yield from lines
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from None


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
            raise ValueError(f"{name} must be a list of ids, whole numbers from 0 to {most}; got {shown(given)}")
        if name == "prompt_ids":
            fits = given in (tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=True))
        else:
            fits = text in (tokenizer.decode_after(given), tokenizer.decode_after(given[:-1]))
        if not fits:
            raise ValueError(
                f"{name} are not this tokenizer's of the text beside them ({shown(text)}): leave the column out, and "
                "the text will be encoded"
            )
        found[name] = tuple(given)
    return found


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
