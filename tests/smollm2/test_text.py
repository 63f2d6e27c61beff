"""Examples as arrays of tokens."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizer_gguf import write_gguf

from jaxkd.smollm2 import example_files, text, tokenization
from jaxkd.smollm2.example_files import Example


def test_prompts_are_padded_on_the_left(tokenizer):
    prompts = text.encode_prompts(tokenizer, [Example("abc"), Example("hello")], context=16)
    assert prompts.tokens.dtype == np.int32 and prompts.tokens.shape == (2, 5)
    assert prompts.mask.sum(axis=1).tolist() == [3, 5] and prompts.mask[:, -1].all()
    assert [tokenizer.decode(row[mask]) for row, mask in zip(*prompts, strict=True)] == ["abc", "hello"]
    assert (prompts.tokens[~prompts.mask] == tokenizer.pad_id).all()


def test_texts_are_as_wide_as_the_longest_and_end_with_the_end(tokenizer):
    """A long prompt and a long completion of different rows do not add up."""
    examples = [Example("abcdef", "g"), Example("a", "uvwxyz")]
    batch = text.encode_sequences(tokenizer, examples, max_length=16)
    assert batch.tokens.shape == (2, 8)
    assert batch.completion_mask.argmax(axis=1).tolist() == [6, 1] and batch.mask[:, 0].all()
    assert [tokenizer.decode(t[m]) for t, m in zip(batch.tokens, batch.completion_mask, strict=True)] == [
        "g<|im_end|>",
        "uvwxyz<|im_end|>",
    ]
    assert not (batch.completion_mask & ~batch.mask).any()


def test_the_end_is_the_tokenizers_own_and_added_once(tokenizer):
    # The checkpoint's configuration names another first, as that of Llama 3's chat models does.
    several = tokenization.Tokenizer(tokenizer.backend, tokenizer.special, generation={"eos_token_id": [0, 2]})
    wanted = [*tokenizer.encode("de"), 2]
    for completion in ("de", "de<|im_end|>"):
        assert text.completion_ids(several, Example("abc", completion)) == wanted
    without = tokenization.Tokenizer(tokenizer.backend, {}, generation={"eos_token_id": [0, 2]})
    assert text.completion_ids(without, Example("abc", "de")) == [*wanted[:-1], 0]


def test_tokens_of_samples_are_taken_as_they_are(tmp_path, trained):
    """Of a model that begins texts: the prompt was rendered, a character is cut, words are in unusual pieces."""
    ours = tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained, add_bos=True))
    prompt, letters = "<|im_start|>user\nHi", [ours.encode(letter)[0] for letter in "the"]
    drawn = [*letters, *ours.encode("é")[:1]]
    assert ours.encode("the") != letters
    cut = {"completion": "the\ufffd", "completion_ids": drawn, "finished": False}
    whole = {"completion": "the", "completion_ids": [*letters, 0], "finished": True}
    rows = [
        {"prompt": prompt, "prompt_ids": ours.encode(prompt), **cut},
        {"prompt": prompt, "prompt_ids": ours.encode(prompt, True), **whole},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for file in ("a.jsonl", "a.parquet"):
        examples = example_files.read_examples(tmp_path / file, ours)
        batch = text.encode_sequences(ours, examples, max_length=64)
        for row, ids, mask, completion in zip(rows, *batch, strict=True):
            assert ids[mask & ~completion].tolist() == row["prompt_ids"]
            assert ids[completion].tolist() == row["completion_ids"]
    assert examples[1].prompt_ids[:2] == (1, 1), "the prompt is not one that would get a second beginning"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completion_ids": [1, "2"]}, "completion_ids must be a list of ids, whole numbers from 0 to 1282; got"),
        ({"completion_ids": [-1]}, "completion_ids must be a list of ids"),
        ({"prompt_ids": 7}, "prompt_ids must be a list of ids"),
        ({"prompt_ids": [3]}, r"prompt_ids are not this tokenizer's of the text beside them \('ab'\)"),
        ({"completion_ids": [3, 4, 5]}, "completion_ids are not this tokenizer's .*: leave the column out"),
    ],
)
def test_ids_of_another_tokenizer_are_refused(tokenizer, changes, message):
    row = {"prompt": "ab", "completion": "cd"}
    assert example_files.to_example(row | {"prompt_ids": None, "completion_ids": None}, tokenizer) == Example(
        "ab", "cd"
    )
    with pytest.raises(ValueError, match=message):
        example_files.to_example(row | changes, tokenizer)


def test_no_end_is_added_to_what_the_template_ended(tokenizer):
    asked, *answers = (
        [{"role": role, "content": said}]
        for role, said in (("user", "Sky?"), ("assistant", "Blue."), ("assistant", "Green."))
    )
    example = example_files.to_example({"prompt": asked, "chosen": answers[0], "rejected": answers[1]}, tokenizer)
    assert tokenizer.decode(text.completion_ids(tokenizer, example, "rejected")) == "Green.<|im_end|>\n"


def test_what_does_not_fit_is_refused_or_cut(tokenizer):
    with pytest.raises(ValueError, match=r"prompt 1 has 5 tokens and 4 new ones are asked for; the context .* is 8"):
        text.encode_prompts(tokenizer, [Example("a"), Example("hello")], context=8, new_tokens=4)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        text.encode_prompts(tokenizer, [Example("")], context=8)
    examples = [Example("abc", "defghi")]
    with pytest.raises(ValueError, match=r"row 1 has a prompt of 3 tokens and 7 after it; of both .* at most 8"):
        text.encode_sequences(tokenizer, examples, max_length=8)
    cut = text.encode_sequences(tokenizer, examples, max_length=8, truncate=True)
    assert tokenizer.decode(cut.tokens[0]) == "abcdefgh"
    with pytest.raises(ValueError, match=r"rows.jsonl, row 1 has a prompt of 3 tokens; of both .* at most 3"):
        text.encode_rows("rows.jsonl", tokenizer, examples, "completion", 3)
    with pytest.raises(ValueError, match="row 2 has an empty prompt"):
        text.encode_sequences(tokenizer, [*examples, Example("", "a")], max_length=16)
    with pytest.raises(ValueError, match="row 1 has no chosen"):
        text.encode_sequences(tokenizer, examples, "chosen", max_length=8)


def test_shown_example_has_a_line_a_token(tokenizer):
    batch = text.encode_sequences(tokenizer, [Example("ab", "c"), Example("abcd", "e")], max_length=16)
    shown = text.show_example(tokenizer, *(array[0] for array in batch)).splitlines()
    assert [line.split() for line in shown[1:]] == [
        ["0", str(tokenizer.encode("a")[0]), "prompt", "'a'"],
        ["1", str(tokenizer.encode("b")[0]), "prompt", "'b'"],
        ["2", str(tokenizer.encode("c")[0]), "completion", "'c'"],
        ["3", "2", "completion", "'<|im_end|>'"],
        ["4", str(tokenizer.pad_id), "padding", "×", "2"],
    ]
