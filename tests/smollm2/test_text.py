"""Tokenizers, chat templates, files of examples and arrays, without a checkpoint."""

import json
from pathlib import Path

import gguf
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxkd.smollm2 import text
from jaxkd.smollm2.text import Example

TEXTS = [
    "Hello world 12345",
    "x  12   34\n\n  5",
    "it's the end <|im_end|>\n of it",
    "日本語 🤗 é\t\t x",
    "def f(x):\n    return x + 10\n",
    "",
]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="module")
def tokenizer():
    return text.byte_tokenizer()


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE with SmolLM2's rules, learned from this file."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with Path(__file__).open(encoding="utf-8") as lines:
        backend.train_from_iterator(
            lines,
            trainers.BpeTrainer(
                vocab_size=500,
                special_tokens=CONTROL,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
    return backend


@pytest.fixture(scope="module", params=["Prepend", "Metaspace"])
def with_prefix(request):
    """A tokenizer in SentencePiece's manner, which writes a space before a text, in its older and its newer form."""
    backend = Backend(models.BPE(byte_fallback=True))
    if request.param == "Prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    # Words, for pieces of a whole line would cross their ends.
    words = Path(__file__).read_text(encoding="utf-8").split()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=["<s>", "</s>", *bytes_], show_progress=False)
    backend.train_from_iterator(words, trainer)
    return text.Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def write_gguf(path, backend, **changes):
    """A GGUF that holds only a tokenizer."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    if pre := changes.get("pre", "smollm"):
        writer.add_tokenizer_pre(pre)
    tokens += changes.get("more_tokens", [])
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens][: changes.get("types")])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]] + changes.get("more_merges", []))
    if (begin := changes.get("bos", 1)) is not None:
        writer.add_bos_token_id(begin)
    writer.add_eos_token_id(2)
    if "eot" in changes:
        writer.add_eot_token_id(changes["eot"])
    writer.add_context_length(64)
    if (add_bos := changes.get("add_bos", False)) is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(changes.get("template", text.CHATML))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


# --- tokenizers ------------------------------------------------------------------------------------------------------


def test_gguf_gives_the_ids_of_the_tokenizer_that_it_was_made_from(tmp_path, trained):
    ours = text.from_gguf(write_gguf(tmp_path / "a.gguf", trained))
    for sample in TEXTS:
        assert ours.encode(sample) == trained.encode(sample).ids
        assert ours.decode(ours.encode(sample)) == sample
    assert ours.chat_template == text.CHATML
    assert (ours.eos_ids, ours.pad_id, ours.size) == ((2,), 2, trained.get_vocab_size())
    assert ours.settings["model_max_length"] == 64


def test_digits_are_split_before_spaces(tmp_path, trained):
    split = text.from_gguf(write_gguf(tmp_path / "a.gguf", trained))
    plain = text.from_gguf(write_gguf(tmp_path / "b.gguf", trained, pre="gpt-2"))
    assert split.decode(split.encode("  7")[:1]) == "  "
    assert plain.decode(plain.encode("  7")[:1]) == " "


def test_a_beginning_token_is_added_where_the_file_asks_for_it(tmp_path, trained):
    ours = text.from_gguf(write_gguf(tmp_path / "a.gguf", trained, add_bos=True))
    assert ours.encode("end", add_special_tokens=True) == [1, *ours.encode("end")]


def test_llama_3_takes_whole_words_and_begins_texts(tmp_path, trained):
    # No merge leads to this word: only who looks for whole words finds it.
    changes = {"pre": "llama-bpe", "more_tokens": ["zqzqz"]}
    ours = text.from_gguf(write_gguf(tmp_path / "a.gguf", trained, add_bos=None, **changes))
    word = trained.get_vocab_size()
    assert ours.encode("zqzqz", add_special_tokens=True) == [1, word]
    silent = text.from_gguf(write_gguf(tmp_path / "b.gguf", trained, add_bos=False, **changes))
    assert silent.encode("zqzqz", add_special_tokens=True) == [word]
    plain = text.from_gguf(write_gguf(tmp_path / "c.gguf", trained, add_bos=None, **changes | {"pre": "smollm"}))
    assert word not in plain.encode("zqzqz") and plain.encode("a", True) == plain.encode("a")


def test_all_ends_of_a_gguf_end_a_completion(tmp_path, trained):
    ours = text.from_gguf(write_gguf(tmp_path / "a.gguf", trained, eot=0))
    assert ours.eos_ids == (2, 0)
    ours.save_pretrained(tmp_path / "saved")
    assert text.from_directory(tmp_path / "saved").eos_ids == (2, 0)


def test_saved_and_read_again_it_is_the_same(tmp_path, trained):
    first = text.from_gguf(write_gguf(tmp_path / "a.gguf", trained))
    first.save_pretrained(tmp_path / "saved")
    second = text.from_directory(tmp_path / "saved")
    assert (first.special, first.chat_template, first.settings) == (
        second.special,
        second.chat_template,
        second.settings,
    )
    assert first.backend.to_str() == second.backend.to_str()
    assert second.generation == {"bos_token_id": 1, "eos_token_id": 2}
    second.save_pretrained(tmp_path / "again")
    for file in (tmp_path / "saved").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()


def test_transformers_reads_what_is_saved(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for sample in TEXTS:
        assert theirs(sample)["input_ids"] == tokenizer.encode(sample, add_special_tokens=True)
    messages = [{"role": "user", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == text.apply_chat_template(
        tokenizer, messages, add_generation_prompt=True
    )
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_ids[0], tokenizer.pad_id)
    # What the model's generate takes, no more.
    assert [*theirs("a")] == theirs.model_input_names == ["input_ids", "attention_mask"]
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_input_names"] == theirs.model_input_names
    assert transformers.GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2


def test_older_and_newer_places_of_settings(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": "<|endoftext|>", "lstrip": False}
    config["chat_template"] = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2], "temperature": 0.3}))
    read = text.from_directory(tmp_path)
    assert (read.special["eos_token"], read.chat_template, read.eos_ids) == ("<|endoftext|>", "b", (0, 2))
    (tmp_path / "chat_template.jinja").write_text("c")
    assert text.from_directory(tmp_path).chat_template == "c"


NAMED = [{"name": "default", "template": "b"}, {"name": "tool_use", "template": "a"}]


@pytest.mark.parametrize("place", ["files", "list", "gguf"])
def test_named_templates_are_kept(tmp_path, trained, monkeypatch, place):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    ours = text.from_gguf(write_gguf(tmp_path / "a.gguf", trained, template=NAMED))
    if place != "gguf":
        text.from_gguf(write_gguf(tmp_path / "b.gguf", trained)).save_pretrained(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        config = json.loads(path.read_text())
        if place == "list":
            path.write_text(json.dumps(config | {"chat_template": NAMED}))
        else:
            # As transformers reads them, beside these files the entry does not count.
            path.write_text(json.dumps(config | {"chat_template": [{"name": "old", "template": "c"}]}))
            (tmp_path / "chat_template.jinja").write_text("b")
            (tmp_path / "additional_chat_templates").mkdir()
            (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("a")
        ours = text.from_directory(tmp_path)
    assert (ours.chat_template, ours.other_templates) == ("b", {"tool_use": "a"})
    ours.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.chat_template == {"default": "b", "tool_use": "a"}
    again = text.from_directory(tmp_path / "saved")
    assert (again.chat_template, again.other_templates) == (ours.chat_template, ours.other_templates)


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token of .* must be a string, or .*; got 5"),
        ("tokenizer_config.json", {"eos_token": {"id": 2}}, "eos_token of .* must be a string, .* got {'id': 2}"),
        ("tokenizer_config.json", {"unk_token": ["a"]}, "unk_token of .* must be a string"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template of .* must be a string, or a list"),
        ("tokenizer_config.json", {"chat_template": ["a"]}, "chat_template of .* must be a string, or a list"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "chat_template of .* must be a string"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id of .* must be an id or a list of ids; got '2'"),
    ],
)
def test_entries_of_another_type_are_refused_by_name(tmp_path, tokenizer, file, entries, message):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / file).write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        text.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more_merges": ["zqzq zq"]}, r"a\.gguf has tokenizer\.ggml\.merges that do not fit its tokens"),
        ({"more_merges": ["zqzq"]}, r"a\.gguf has a merge that is no pair: 'zqzq'"),
        ({"types": -1}, "500 tokens, but 499 types of tokens"),
        ({"model": "llama"}, "tokenizer in .* is 'llama'"),
        ({"pre": "klingon"}, "pre-tokenizer 'klingon' is not known"),
        ({"pre": None}, "names no pre-tokenizer"),
        ({"pre": "default"}, "pre-tokenizer 'default' is not known"),
        ({"add_bos": True, "bos": None}, "asks for a beginning token and names none"),
        ({"bos": 10**6}, "but names bos_token 1000000"),
    ],
)
def test_other_tokenizers_in_gguf_are_refused_by_name(tmp_path, trained, changes, message):
    with pytest.raises(ValueError, match=message):
        text.from_gguf(write_gguf(tmp_path / "a.gguf", trained, **changes))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all, but long enough to be one"])
def test_what_is_no_gguf_is_refused(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gguf"):
        text.from_gguf(tmp_path / "a.gguf")


def test_bad_folders_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        text.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read as a tokenizer"):
        text.from_directory(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ValueError, match=r"eos_token of .* is '<end>', which is not in the vocabulary"):
        text.from_directory(tmp_path)


class WithIds:
    """A backend of so many ids, and nothing else."""

    def __init__(self, size):
        self.size = size

    def get_vocab(self, with_added_tokens):
        return {str(i): i for i in range(self.size)}


def test_vocabularies_that_do_not_match_are_refused(tokenizer, trained):
    text.check_vocabulary(tokenizer, tokenizer.size)
    text.check_vocabulary(tokenizer, tokenizer.size + 61)
    # deepseek-llm-7b's: 2385 rows for tokens to come.
    many = text.Tokenizer(WithIds(100015), {})
    text.check_vocabulary(many, 102400)
    with pytest.raises(ValueError, match="100015 ids and the model a vocabulary of 128256"):
        text.check_vocabulary(many, 128256)
    for size in (tokenizer.size - 1, 49152):
        with pytest.raises(ValueError, match=f"259 ids and the model a vocabulary of {size}"):
            text.check_vocabulary(tokenizer, size)
    text.check_same_vocabulary(tokenizer, text.byte_tokenizer())
    with pytest.raises(ValueError, match=r"differ \(259 and 500 tokens\)"):
        text.check_same_vocabulary(tokenizer, text.Tokenizer(trained, {}))


def test_ends_are_those_of_the_configuration_where_no_other_file_names_them(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "top_k": 5}))
    assert text.load_tokenizer(tmp_path).eos_ids == (2, 1)
    (tmp_path / "generation_config.json").unlink()
    assert text.load_tokenizer(tmp_path).eos_ids == (2, 1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert text.load_tokenizer(tmp_path).eos_ids == (0,)
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).unlink()
    assert text.load_tokenizer(tmp_path).eos_ids == (tokenizer.id_of("eos_token"),)


def pieces(tokenizer, ids):
    return [tokenizer.backend.id_to_token(i) for i in ids]


@pytest.mark.parametrize(
    ("before", "after"),
    [("The tokenizer is", " trained"), ("assert", "ion"), ("in ", "the"), ("", "the"), ("the</s>", "the"), ("the", "")],
)
def test_a_completion_gets_no_space_that_is_not_its_own(with_prefix, before, after):
    ids = with_prefix.encode(before) + with_prefix.encode_after(before, after)
    # The text is that of the two, and its own tokens wherever the first text ends with one of them.
    assert with_prefix.decode(ids) == with_prefix.decode(with_prefix.encode(before + after))
    whole = with_prefix.encode(before + after)
    if whole[: len(with_prefix.encode(before))] == with_prefix.encode(before):
        assert ids == whole


def test_a_completion_alone_is_decoded_with_its_space(with_prefix):
    ids = with_prefix.encode_after("The", " trained tokenizer")
    assert with_prefix.decode_after(ids) == " trained tokenizer"
    assert with_prefix.decode_after(with_prefix.encode_after("in ", "the")) == "the"
    assert with_prefix.decode(ids) == "trained tokenizer"


def test_byte_level_completions_are_encoded_as_if_alone(tmp_path, trained):
    ours = text.from_gguf(write_gguf(tmp_path / "a.gguf", trained))
    assert ours._inside is ours.backend
    for before in TEXTS:
        for after in TEXTS:
            assert ours.encode_after(before, after) == ours.encode(after)
            assert ours.decode_after(ours.encode(after)) == after


# --- chat template ---------------------------------------------------------------------------------------------------


def with_template(tokenizer, template):
    return text.Tokenizer(tokenizer.backend, tokenizer.special, template)


def test_template_has_what_checkpoints_rely_on(tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'skip' %}{% continue %}{% endif %}"
        "{{ bos_token }}{% generation %}{{ m['content'] }}{% endgeneration %}{{ {'é': '<'} | tojson }}"
        "{{ {'b': 'é', 'a': 1} | tojson(ensure_ascii=True, separators=(',', ':'), sort_keys=True) }}{% endfor %}"
    )
    messages = [{"role": "skip", "content": "no"}, {"role": "user", "content": "yes", "name": None}]
    rendered = text.apply_chat_template(with_template(tokenizer, template), messages)
    assert rendered == '<|im_start|>yes{"é": "<"}{"a":1,"b":"\\u00e9"}'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% if %}", "refuses"),
        (None, "has no chat template"),
    ],
)
def test_template_can_refuse_and_can_not_reach_out(tokenizer, template, message):
    with pytest.raises(ValueError, match=message):
        text.apply_chat_template(with_template(tokenizer, template), [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(("content", "trimmed"), [("It is ", False), ("It is ", True), ("It is", True)])
def test_final_message_is_continued(tokenizer, content, trimmed):
    template = text.CHATML.replace("message['content']", "message['content'] | trim") if trimmed else text.CHATML
    rendered = text.apply_chat_template(
        with_template(tokenizer, template), [{"role": "assistant", "content": content}], continue_final=True
    )
    assert rendered == "<|im_start|>assistant\n" + (content.rstrip() if trimmed else content)


# --- files -----------------------------------------------------------------------------------------------------------


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
    assert text.read_examples(path, tokenizer) == [expected, expected]
    assert text.read_examples(tmp_path, tokenizer) == [expected, expected]


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
        text.read_examples(path, tokenizer)
    assert "rows.jsonl, row 2" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"{\n", "line 1 is not JSON"),
        ("a.jsonl", b"[1]\n", "must be a JSON object, got list"),
        ("a.jsonl", b"", "has no rows"),
        ("a.parquet", b"PAR1", "can't be read as Parquet"),
        ("a.csv", b"prompt\n", "must end in"),
        ("a.jsonl", None, "there is no file"),
    ],
)
def test_bad_files_are_refused(tmp_path, tokenizer, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text.read_examples(tmp_path / name, tokenizer)


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_prompts_are_padded_on_the_left(tokenizer):
    prompts = text.encode_prompts(tokenizer, [Example("abc"), Example("hello")], context=16, multiple_of=4)
    assert prompts.tokens.dtype == np.int32 and prompts.tokens.shape == (2, 8)
    assert prompts.mask.sum(axis=1).tolist() == [3, 5] and prompts.mask[:, -1].all()
    assert [tokenizer.decode(row[mask]) for row, mask in zip(*prompts, strict=True)] == ["abc", "hello"]
    assert (prompts.tokens[~prompts.mask] == tokenizer.pad_id).all()


def test_completions_start_in_one_column_and_end_with_the_end(tokenizer):
    examples = [Example("abc", "de"), Example("a", "xyz")]
    batch = text.encode_sequences(tokenizer, examples, context=16)
    assert batch.tokens.shape == (2, 3 + 4)
    assert batch.completion_mask.argmax(axis=1).tolist() == [3, 3]
    assert [tokenizer.decode(t[m]) for t, m in zip(batch.tokens, batch.completion_mask, strict=True)] == [
        "de<|im_end|>",
        "xyz<|im_end|>",
    ]
    assert not (batch.completion_mask & ~batch.mask).any()


def test_the_end_is_the_tokenizers_own_and_added_once(tokenizer):
    # The checkpoint's configuration names another first, as that of Llama 3's chat models does.
    several = text.Tokenizer(tokenizer.backend, tokenizer.special, generation={"eos_token_id": [0, 2]})
    wanted = [*tokenizer.encode("de"), 2]
    for completion in ("de", "de<|im_end|>"):
        assert text.completion_ids(several, Example("abc", completion)) == wanted
    without = text.Tokenizer(tokenizer.backend, {}, generation={"eos_token_id": [0, 2]})
    assert text.completion_ids(without, Example("abc", "de")) == [*wanted[:-1], 0]


def test_tokens_of_samples_are_taken_as_they_are(tmp_path, trained):
    """Of a model that begins texts: the prompt was rendered, a character is cut, words are in unusual pieces."""
    ours = text.from_gguf(write_gguf(tmp_path / "a.gguf", trained, add_bos=True))
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
        examples = text.read_examples(tmp_path / file, ours)
        batch = text.encode_sequences(ours, examples, context=64)
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
    assert text.to_example(row | {"prompt_ids": None, "completion_ids": None}, tokenizer) == Example("ab", "cd")
    with pytest.raises(ValueError, match=message):
        text.to_example(row | changes, tokenizer)


def test_no_end_is_added_to_what_the_template_ended(tokenizer):
    example = text.to_example({"prompt": [SKY], "chosen": [BLUE], "rejected": [GREEN]}, tokenizer)
    assert tokenizer.decode(text.completion_ids(tokenizer, example, "rejected")) == "Green.<|im_end|>\n"


def test_what_does_not_fit_is_refused_or_cut(tokenizer):
    with pytest.raises(ValueError, match=r"prompt 1 has 5 tokens and 4 new ones are asked for; the context .* is 8"):
        text.encode_prompts(tokenizer, [Example("a"), Example("hello")], context=8, new_tokens=4)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        text.encode_prompts(tokenizer, [Example("")], context=8)
    examples = [Example("abc", "defghi")]
    with pytest.raises(ValueError, match="example 0 has 10 tokens; the context of the model is 8"):
        text.encode_sequences(tokenizer, examples, context=8)
    cut = text.encode_sequences(tokenizer, examples, context=8, truncate=True)
    assert tokenizer.decode(cut.tokens[0]) == "abcdefgh"
    with pytest.raises(ValueError, match="prompt 0 has 3 tokens"):
        text.encode_sequences(tokenizer, examples, context=3, truncate=True)
    with pytest.raises(ValueError, match="has no chosen"):
        text.encode_sequences(tokenizer, examples, "chosen", context=8)


def test_shown_example_has_a_line_a_token(tokenizer):
    batch = text.encode_sequences(tokenizer, [Example("ab", "c"), Example("abcd", "e")], context=16)
    shown = text.show_example(tokenizer, *(array[0] for array in batch)).splitlines()
    assert [line.split() for line in shown[1:]] == [
        ["0", "0", "padding", "×", "2"],
        ["2", str(tokenizer.encode("a")[0]), "prompt", "'a'"],
        ["3", str(tokenizer.encode("b")[0]), "prompt", "'b'"],
        ["4", str(tokenizer.encode("c")[0]), "completion", "'c'"],
        ["5", "2", "completion", "'<|im_end|>'"],
    ]
