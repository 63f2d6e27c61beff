"""Tokenizers, without a checkpoint."""

import json
from pathlib import Path

import pytest
from tokenizer_gguf import write_gguf
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxkd.smollm2 import chat, tokenization

TEXTS = [
    "Hello world 12345",
    "x  12   34\n\n  5",
    "it's the end <|im_end|>\n of it",
    "日本語 🤗 é\t\t x",
    "def f(x):\n    return x + 10\n",
    "",
]


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
    return tokenization.Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


def test_gguf_gives_the_ids_of_the_tokenizer_that_it_was_made_from(tmp_path, trained):
    ours = tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained))
    for sample in TEXTS:
        assert ours.encode(sample) == trained.encode(sample).ids
        assert ours.decode(ours.encode(sample)) == sample
    assert ours.chat_template == tokenization.CHATML
    assert (ours.eos_ids, ours.pad_id, ours.size) == ((2,), 2, trained.get_vocab_size())
    assert ours.settings["model_max_length"] == 64


def test_digits_are_split_before_spaces(tmp_path, trained):
    split = tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained))
    plain = tokenization.from_gguf(write_gguf(tmp_path / "b.gguf", trained, pre="gpt-2"))
    assert split.decode(split.encode("  7")[:1]) == "  "
    assert plain.decode(plain.encode("  7")[:1]) == " "


def test_a_beginning_token_is_added_where_the_file_asks_for_it(tmp_path, trained):
    ours = tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained, add_bos=True))
    assert ours.encode("end", add_special_tokens=True) == [1, *ours.encode("end")]


def test_llama_3_takes_whole_words_and_begins_texts(tmp_path, trained):
    # No merge leads to this word: only who looks for whole words finds it.
    changes = {"pre": "llama-bpe", "more_tokens": ["zqzqz"]}
    ours = tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained, add_bos=None, **changes))
    word = trained.get_vocab_size()
    assert ours.encode("zqzqz", add_special_tokens=True) == [1, word]
    silent = tokenization.from_gguf(write_gguf(tmp_path / "b.gguf", trained, add_bos=False, **changes))
    assert silent.encode("zqzqz", add_special_tokens=True) == [word]
    plain = tokenization.from_gguf(
        write_gguf(tmp_path / "c.gguf", trained, add_bos=None, **changes | {"pre": "smollm"})
    )
    assert word not in plain.encode("zqzqz") and plain.encode("a", True) == plain.encode("a")


def test_all_ends_of_a_gguf_end_a_completion(tmp_path, trained):
    ours = tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained, eot=0))
    assert ours.eos_ids == (2, 0)
    ours.save_pretrained(tmp_path / "saved")
    assert tokenization.from_directory(tmp_path / "saved").eos_ids == (2, 0)


def test_saved_and_read_again_it_is_the_same(tmp_path, trained):
    first = tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained))
    first.save_pretrained(tmp_path / "saved")
    second = tokenization.from_directory(tmp_path / "saved")
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
    assert theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == chat.apply_chat_template(
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
    read = tokenization.from_directory(tmp_path)
    assert (read.special["eos_token"], read.chat_template, read.eos_ids) == ("<|endoftext|>", "b", (0, 2))
    (tmp_path / "chat_template.jinja").write_text("c")
    assert tokenization.from_directory(tmp_path).chat_template == "c"


NAMED = [{"name": "default", "template": "b"}, {"name": "tool_use", "template": "a"}]


@pytest.mark.parametrize("place", ["files", "list", "gguf"])
def test_named_templates_are_kept(tmp_path, trained, monkeypatch, place):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers

    ours = tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained, template=NAMED))
    if place != "gguf":
        tokenization.from_gguf(write_gguf(tmp_path / "b.gguf", trained)).save_pretrained(tmp_path)
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
        ours = tokenization.from_directory(tmp_path)
    assert (ours.chat_template, ours.other_templates) == ("b", {"tool_use": "a"})
    ours.save_pretrained(tmp_path / "saved")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.chat_template == {"default": "b", "tool_use": "a"}
    again = tokenization.from_directory(tmp_path / "saved")
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
        tokenization.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"more_merges": ["zqzq zq"]}, r"a\.gguf has tokenizer\.ggml\.merges that do not fit its tokens"),
        ({"more_merges": ["zqzq"]}, r"a\.gguf has a merge that is no pair: 'zqzq'"),
        ({"types": -1}, "500 tokens, but 499 types of tokens"),
        ({"model": "llama"}, "tokenizer in .* is 'llama'; .*; take the model's folder of safetensors or its hub id"),
        ({"pre": "klingon"}, "pre-tokenizer 'klingon' is not known"),
        ({"pre": None}, "names no pre-tokenizer"),
        ({"pre": "default"}, "pre-tokenizer 'default' is not known"),
        ({"add_bos": True, "bos": None}, "asks for a beginning token and names none"),
        ({"bos": 10**6}, "but names bos_token 1000000"),
    ],
)
def test_other_tokenizers_in_gguf_are_refused_by_name(tmp_path, trained, changes, message):
    with pytest.raises(ValueError, match=message):
        tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained, **changes))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all, but long enough to be one"])
def test_what_is_no_gguf_is_refused(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gguf"):
        tokenization.from_gguf(tmp_path / "a.gguf")


def test_bad_folders_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        tokenization.from_directory(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read as a tokenizer"):
        tokenization.from_directory(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    with pytest.raises(ValueError, match=r"eos_token of .* is '<end>', which is not in the vocabulary"):
        tokenization.from_directory(tmp_path)


class WithIds:
    """A backend of so many ids, and nothing else."""

    def __init__(self, size):
        self.size = size

    def get_vocab(self, with_added_tokens):
        return {str(i): i for i in range(self.size)}


def test_vocabularies_that_do_not_match_are_refused(tokenizer, trained):
    tokenization.check_vocabulary(tokenizer, tokenizer.size)
    tokenization.check_vocabulary(tokenizer, tokenizer.size + 61)
    # deepseek-llm-7b's: 2385 rows for tokens to come.
    many = tokenization.Tokenizer(WithIds(100015), {})
    tokenization.check_vocabulary(many, 102400)
    with pytest.raises(ValueError, match="100015 ids and the model a vocabulary of 128256"):
        tokenization.check_vocabulary(many, 128256)
    for size in (tokenizer.size - 1, 49152):
        with pytest.raises(ValueError, match=f"259 ids and the model a vocabulary of {size}"):
            tokenization.check_vocabulary(tokenizer, size)
    tokenization.check_same_vocabulary(tokenizer, tokenization.byte_tokenizer())
    with pytest.raises(ValueError, match=r"differ \(259 and 500 tokens\)"):
        tokenization.check_same_vocabulary(tokenizer, tokenization.Tokenizer(trained, {}))


def test_ends_are_those_of_the_configuration_where_no_other_file_names_them(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": None, "top_k": 5}))
    assert tokenization.load_tokenizer(tmp_path).eos_ids == (2, 1)
    (tmp_path / "generation_config.json").unlink()
    assert tokenization.load_tokenizer(tmp_path).eos_ids == (2, 1)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 0}))
    assert tokenization.load_tokenizer(tmp_path).eos_ids == (0,)
    for name in ("generation_config.json", "config.json"):
        (tmp_path / name).unlink()
    assert tokenization.load_tokenizer(tmp_path).eos_ids == (tokenizer.id_of("eos_token"),)


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
    ours = tokenization.from_gguf(write_gguf(tmp_path / "a.gguf", trained))
    assert ours._inside is ours.backend
    for before in TEXTS:
        for after in TEXTS:
            assert ours.encode_after(before, after) == ours.encode(after)
            assert ours.decode_after(ours.encode(after)) == after
