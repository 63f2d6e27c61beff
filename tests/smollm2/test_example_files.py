"""Files of examples in every format."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxkd.smollm2 import example_files
from jaxkd.smollm2.example_files import Example


def said(role, content):
    return {"role": role, "content": content}


SKY, BLUE, GREEN = said("user", "Sky?"), said("assistant", "Blue."), said("assistant", "Green.")
ASKED = "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
ROWS = [
    ({"prompt": "The sky is"}, Example("The sky is")),
    ({"prompt": "The sky is", "completion": " blue."}, Example("The sky is", " blue.")),
    (
        {"prompt": "Sky", "chosen": " is blue", "rejected": " is green"},
        Example("Sky", chosen=" is blue", rejected=" is green"),
    ),
    (
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
        Example("The sky is", chosen=" blue.", rejected=" green."),
    ),
    ({"chosen": "Yes", "rejected": "Yes!"}, Example("Ye", chosen="s", rejected="s!")),
    ({"prompt": [SKY]}, Example(ASKED, from_chat=True)),
    ({"prompt": [SKY], "completion": [BLUE]}, Example(ASKED, "Blue.<|im_end|>\n", from_chat=True)),
    (
        {"prompt": [SKY, said("assistant", "It is")]},
        Example(ASKED + "It is", from_chat=True),
    ),
    *(
        (row, Example(ASKED, chosen="Blue.<|im_end|>\n", rejected="Green.<|im_end|>\n", from_chat=True))
        for row in (
            {"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]},
            {"chosen": [SKY, BLUE], "rejected": [SKY, GREEN]},
            {"prompt": "Sky?", "chosen": [SKY, BLUE], "rejected": [SKY, GREEN]},
        )
    ),
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("row", range(len(ROWS)))
def test_every_format_is_read(tmp_path, tokenizer, suffix, row):
    content, expected = ROWS[row]
    content = content | {"source": "made up"}
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(content) + "\n\n" + json.dumps(content) + "\n", encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([content, content]), path)
    assert example_files.read_examples(path, tokenizer) == [expected, expected]
    assert example_files.read_examples(tmp_path, tokenizer) == [expected, expected]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a"}, "columns of one format"),
        ({"prompt": "a", "chosen": "b"}, "columns of one format"),
        ({"prompt": "a", "completion": [BLUE]}, "both be strings or both be lists"),
        ({"prompt": "a", "chosen": "b", "rejected": [BLUE]}, "both be strings or both be lists"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": [BLUE], "rejected": [GREEN]}, "begin with the same message"),
        ({"prompt": []}, "prompt must be a string or a list of messages"),
        ({"prompt": 3}, "prompt must be a string or a list of messages"),
        ({"prompt": [{"content": "a"}]}, "must have a role"),
        ({"prompt": [{"role": "user", "content": 3}]}, "content of a message of prompt must be a string"),
        ({"prompt": [said("system", "a")]}, "got system"),
    ],
)
def test_bad_rows_are_refused_with_file_and_row(tmp_path, tokenizer, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "fine"}) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        example_files.read_examples(path, tokenizer)
    assert "rows.jsonl, row 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{\n", "line 1 is not JSON"),
        ("a.jsonl", b"[1]\n", "must be a JSON object, got list"),
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), r"a\.jsonl is not UTF-8: .*0xe9"),
        ("a.parquet", b"PAR1", "can't be read as Parquet"),
        ("a.csv", b"prompt\n", "must end in"),
        ("a.jsonl", None, "there is no file"),
    ],
)
def test_bad_files_are_refused(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        example_files.read_examples(tmp_path / name, tokenizer)
