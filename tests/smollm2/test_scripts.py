"""The scripts as they are called: what they write, what they refuse, and going on after a kill."""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import jax
import numpy as np
import pyarrow.parquet
import pytest

from jaxkd.smollm2 import example_files, network, sharding, tokenization, weights
from jaxkd.sweep import cache

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
SAMPLE = EXPERIMENTS / "sample.py"
CONVERT = EXPERIMENTS / "convert.py"
# One batch size wherever it does not matter: then one program is compiled.
TINY = ["--source", "random:tiny", "--prompt", "ab", "--max-new-tokens", "8", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch):
    monkeypatch.setattr(cache, "use_compile_cache", lambda *arguments: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A folder with a tiny model."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    config, params = weights.load("random:tiny")
    weights.save_pretrained(folder, config, params, tokenization.byte_tokenizer())
    return folder


def rows_of(folder):
    return [
        row for path in sorted(folder.glob("part-*.parquet")) for row in pyarrow.parquet.read_table(path).to_pylist()
    ]


# --- sample.py -------------------------------------------------------------------------------------------------------


def test_samples_are_written_and_read_back(run, tmp_path):
    code, _, err = run(
        SAMPLE,
        *TINY,
        "--prompt",
        "ab",
        "c",
        "--samples",
        5,
        "--samples-per-shard",
        4,
        "--out",
        tmp_path / "out",
    )
    assert code == 0, err
    assert "tokens/s" in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "corpus.json",
        *(f"part-0000{i}.parquet" for i in range(3)),
    ]
    rows = rows_of(tmp_path / "out")
    assert [(row["prompt_index"], row["sample_index"]) for row in rows] == [(i // 5, i % 5) for i in range(10)]
    tokenizer = tokenization.byte_tokenizer()
    for row in rows:
        assert row["prompt"] == ["ab", "c"][row["prompt_index"]]
        ids = row["completion_ids"]
        assert row["finished"] == (ids[-1] == 2)
        assert len(ids) == 8 or row["finished"]
        assert row["completion"] == tokenizer.decode(ids[:-1] if row["finished"] else ids)
        # A fresh model draws from nearly uniform distributions.
        assert row["log_prob"] / len(ids) == pytest.approx(-np.log(264), rel=0.1)
    assert len({tuple(row["completion_ids"]) for row in rows}) == 10
    read = example_files.read_examples(tmp_path / "out", tokenizer)
    assert [example.completion for example in read] == [row["completion"] for row in rows]
    # As training data again they are the very tokens, though a fresh model's bytes are seldom UTF-8.
    assert "\ufffd" in "".join(row["completion"] for row in rows)
    distill = runpy.run_path(str(EXPERIMENTS / "distill.py"))
    arguments = {"teacher": "random:tiny", "out": tmp_path / "student", "held_out": 4, "batch_size": 4}
    texts = distill["read_texts"](distill["Distill"](data=tmp_path / "out", **arguments), tokenizer)
    pairs = [
        (ids[mask & ~completion].tolist(), ids[completion].tolist())
        for ids, mask, completion in zip(*texts, strict=True)
    ]
    assert sorted(pairs) == sorted((row["prompt_ids"], row["completion_ids"]) for row in rows)
    assert not all(row["finished"] for row in rows)
    beyond = {"prompt": "a", "completion": "", "completion_ids": [270]}
    (tmp_path / "a.jsonl").write_text((json.dumps(beyond) + "\n") * 8)
    with pytest.raises(ValueError, match=r"row 1: completion_ids must be .* from 0 to 263; got"):
        distill["read_texts"](distill["Distill"](data=tmp_path / "a.jsonl", **arguments), tokenizer)


def test_batches_and_formats_change_nothing(run, tmp_path):
    for name, *more in (("a", "--batch-size", 3), ("b", "--format", "jsonl")):
        code, _, err = run(SAMPLE, *TINY, "--samples", 7, "--out", tmp_path / name, *more)
        assert code == 0, err
    lines = (tmp_path / "b/part-00000.jsonl").read_text(encoding="utf-8").splitlines()
    for one, other in zip(rows_of(tmp_path / "a"), map(json.loads, lines), strict=True):
        assert one.pop("log_prob") == pytest.approx(other.pop("log_prob"), rel=1e-5)
        assert one == other


def test_several_devices_change_nothing(run, tmp_path, monkeypatch):
    arguments = [*TINY, "--samples", 6, "--samples-per-shard", 6]
    for name, *more in (("data", "--batch-size", 4), ("both", "--batch-size", 4, "--tensor-parallel", 2)):
        code, _, err = run(SAMPLE, *arguments, *more, "--out", tmp_path / name)
        assert code == 0, err
    monkeypatch.setattr(sharding, "mesh_of_all_devices", lambda tensor_parallel: None)
    code, _, err = run(SAMPLE, *arguments, "--out", tmp_path / "one")
    assert code == 0, err
    one = rows_of(tmp_path / "one")
    log_probs = [row.pop("log_prob") for row in one]
    assert len(one) == 6
    for name in ("data", "both"):
        rows = rows_of(tmp_path / name)
        assert [row.pop("log_prob") for row in rows] == pytest.approx(log_probs, rel=1e-5)
        assert rows == one


@pytest.mark.slow
@pytest.mark.loose
def test_what_is_computed_again_changes_no_training(run, tmp_path, monkeypatch):
    pairs, made = tmp_path / "pairs.jsonl", []
    rows = [{"prompt": f"Say {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = network.make_model

    def noted(config, **more):
        made.append(more["remat"])
        return plain(config, **more)

    monkeypatch.setattr(network, "make_model", noted)
    trained = {}
    for remat in ("products", "layers"):
        network._model.cache_clear()
        code, _, err = run(
            EXPERIMENTS / "align.py", "--source", "random:tiny", "--preferences", pairs, "--updates", 3,
            "--batch-size", 4, "--learning-rate", "1e-3", "--remat", remat, "--out", tmp_path / remat,
        )  # fmt: skip
        assert code == 0, err
        trained[remat] = weights.load(tmp_path / remat / "model")[1]
    assert set(made) == {"products", "layers"}
    far = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained["products"], trained["layers"])
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), trained["products"], weights.load("random:tiny")[1])
    assert max(jax.tree.leaves(far)) < 0.02 * max(jax.tree.leaves(moved))


def test_chat_and_files_of_prompts(run, tmp_path):
    code, _, err = run(SAMPLE, *TINY, "--chat", "--samples", 2, "--out", tmp_path / "chat")
    assert code == 0, err
    assert rows_of(tmp_path / "chat")[0]["prompt"] == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        json.dumps(
            {"prompt": [{"role": "user", "content": "ab"}], "completion": [{"role": "assistant", "content": "c"}]}
        )
    )
    arguments = ["--source", "random:tiny", "--prompts", path, "--samples", 2, "--max-new-tokens", 8]
    code, _, err = run(SAMPLE, *arguments, "--out", tmp_path / "file")
    assert code == 0, err
    assert rows_of(tmp_path / "chat") == rows_of(tmp_path / "file")
    path.write_text(path.read_text().replace("ab", "ba"))
    code, _, err = run(SAMPLE, *arguments, "--out", tmp_path / "file")
    assert code == 2 and "another configuration (prompts_digest: " in err


def test_example_is_shown(run, tmp_path):
    code, out, _ = run(SAMPLE, *TINY, "--show-example", "--out", tmp_path / "out")
    assert code == 0
    assert [line.split()[2:] for line in out.splitlines()[1:3]] == [["prompt", "'a'"], ["prompt", "'b'"]]
    assert not (tmp_path / "out").exists()


def test_same_command_goes_on_and_another_is_refused(run, tmp_path, monkeypatch):
    arguments = [*TINY, "--samples", 4, "--samples-per-shard", 2, "--out", tmp_path / "out"]
    assert run(SAMPLE, *arguments)[0] == 0
    first, second = sorted((tmp_path / "out").glob("part-*"))
    held = second.read_bytes()
    untouched = first.stat().st_mtime_ns
    second.unlink()
    assert run(SAMPLE, *arguments, "--batch-size", 64)[0] == 0
    assert (first.stat().st_mtime_ns, second.read_bytes()) == (untouched, held)
    code, _, err = run(SAMPLE, *arguments, "--seed", 1)
    assert code == 2 and "another configuration (seed: 0 there, 1 now)" in err
    assert run(SAMPLE, *arguments, "--seed", 1, "--overwrite")[0] == 0
    assert second.read_bytes() != held
    second.unlink()
    _, params = weights.load("random:tiny")
    changed = jax.tree.map(lambda leaf: leaf * 2, params)
    monkeypatch.setattr(weights, "load", lambda source, **_: (weights.load_config(source), changed))
    code, _, err = run(SAMPLE, *arguments, "--seed", 1)
    assert code == 2 and "another configuration (weights: " in err
    monkeypatch.undo()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/precious").touch()
    code, _, err = run(SAMPLE, *TINY, "--out", tmp_path / "other", "--overwrite")
    assert code == 2 and "holds no samples" in err and (tmp_path / "other/precious").exists()


def test_killed_and_repeated_it_writes_the_same(run, tmp_path):
    # So many that it is far from done when the first few are seen, however late that is.
    arguments = [*TINY, "--samples", 160, "--samples-per-shard", 2]
    command = [sys.executable, SAMPLE, *map(str, arguments), "--out", tmp_path / "killed"]
    # As many devices as here: the rows of a device are a program's shape, and log-probabilities are rounded by it.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(jax.device_count())}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path / "programs")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment)
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed/part-00001.parquet").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list((tmp_path / "killed").glob("part-*.parquet")))
    assert 2 <= done < 80
    (tmp_path / "killed/part-00079.parquet.partial").write_bytes(b"PAR1 torn")
    for name in ("killed", "whole"):
        code, _, err = run(SAMPLE, *arguments, "--out", tmp_path / name)
        assert code == 0, err
    assert rows_of(tmp_path / "killed") == rows_of(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob("*.partial"))


# --- convert.py ------------------------------------------------------------------------------------------------------


def test_converting_twice_is_bit_equal(run, tmp_path, checkpoint):
    assert run(CONVERT, checkpoint, tmp_path / "a")[0] == 0
    assert run(CONVERT, tmp_path / "a", tmp_path / "b")[0] == 0
    names = sorted(path.name for path in checkpoint.iterdir())
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    } <= set(names)
    for folder in (tmp_path / "a", tmp_path / "b"):
        assert sorted(path.name for path in folder.iterdir()) == names
        for name in names:
            assert (folder / name).read_bytes() == (checkpoint / name).read_bytes(), name
    code, _, err = run(CONVERT, checkpoint, tmp_path / "a")
    assert code == 2 and "is not empty" in err
    refused(run, "DIRECTORY must be a folder, got gs:/bucket/a: buckets are not", CONVERT, checkpoint, "gs://bucket/a")
    refused(run, "a revision ('v1') is of a hub id", CONVERT, checkpoint, tmp_path / "c", "--revision", "v1")
    assert run(CONVERT, checkpoint, tmp_path / "a", "--overwrite", "--dtype", "bfloat16")[0] == 0
    assert (tmp_path / "a/model.safetensors").stat().st_size < 0.6 * (checkpoint / "model.safetensors").stat().st_size


# --- bad input -------------------------------------------------------------------------------------------------------


def broken(kind, checkpoint, folder):
    """A damaged copy of a checkpoint."""
    shutil.copytree(checkpoint, folder)
    if kind == "missing shard":
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "truncated":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif kind == "vocabulary":
        config = json.loads((folder / "tokenizer.json").read_text())
        first = config["added_tokens"][0]
        config["added_tokens"] += [first | {"id": 259 + i, "content": f"<new {i}>"} for i in range(10)]
        (folder / "tokenizer.json").write_text(json.dumps(config))
    elif kind == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))
    elif kind == "shape":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    return folder


@pytest.mark.parametrize("script", ["sample", "convert"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing shard", "model-00001-of-00002.safetensors is missing"),
        ("truncated", "can't be read as safetensors"),
        ("vocabulary", "do not belong together"),
        ("architecture", "got 'mamba'"),
        ("shape", "18 missing: "),
    ],
)
def test_damaged_checkpoints_are_refused(run, tmp_path, checkpoint, script, kind, message):
    source = broken(kind, checkpoint, tmp_path / "broken")
    if script == "sample":
        refused(run, message, SAMPLE, "--source", source, "--prompt", "ab", "--out", tmp_path / "out")
    else:
        refused(run, message, CONVERT, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def refused(run, message, *call):
    """One message, no traceback, exit 2."""
    code, out, err = run(*call)
    assert code == 2
    # tyro draws a box around its message and breaks lines.
    told = " ".join(err.replace("│", " ").split())
    assert message in told
    assert "Traceback" not in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-p", "0"], "--top-p must be a finite number above 0 and at most 1; got 0"),
        (["--top-k", "0"], "--top-k must be a whole number of at least 1"),
        (["--min-p", "2"], "--min-p must be a finite number"),
        (["--temperature", "nan"], "--temperature must be a finite number"),
        (["--samples", "0"], "--samples must be a whole number of at least 1"),
        (
            ["--max-new-tokens", "127"],
            "prompt 0 has 2 tokens and 127 new ones are asked for; the context of the model is 128",
        ),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "a" * 130], "prompt 0 has 130 tokens"),
        (["--prompt"], "--prompt"),
        (["--prompts", "nowhere.jsonl"], "give either --prompt or --prompts"),
        (["--format", "csv"], "--format must be one of parquet, jsonl"),
        (["--dtype", "int8"], "--dtype must be one of float32, bfloat16"),
        (["--source", "random:huge"], "random:huge"),
        (["--source", "nothing-here"], "nothing to load weights from"),
        (["--tensor-parallel", "3"], "--tensor-parallel must divide the number of devices, 4; got 3"),
        (["--tensor-parallel", "4"], "the mesh's axis 'model' of 4 devices does not divide the 2 heads of keys"),
        (["--tensor-parallel", "0"], "--tensor-parallel must be a whole number of at least 1"),
        (["--revision", "v1"], "a revision ('v1') is of a hub id; random:tiny is none"),
        (["--source", "wheel:no-such-wheel"], "not installed"),
    ],
)
def test_bad_arguments_of_sample_are_refused(run, tmp_path, monkeypatch, arguments, message):
    # Of a hub id they would be fetched.
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("the weights are not needed for this"))
    refused(run, message, SAMPLE, *TINY, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_prompt_of_a_file_is_refused_with_the_file_and_counted_from_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("the weights are not needed for this"))
    path = tmp_path / "prompts.jsonl"
    call = [SAMPLE, "--source", "random:tiny", "--prompts", path, "--out", tmp_path / "out"]
    for second, message in (("a" * 130, "has 130 tokens"), ("", "is empty")):
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("ab", second)))
        refused(run, f"prompts.jsonl, prompt 2 {message}", *call)


@pytest.mark.parametrize("script", ["sample", "convert"])
def test_unknown_hub_id_without_network(run, tmp_path, monkeypatch, script):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    call = (
        [SAMPLE, "--source", "nobody/no-such-model", "--prompt", "a", "--out", tmp_path / "out"]
        if script == "sample"
        else [CONVERT, "nobody/no-such-model", tmp_path / "out"]
    )
    refused(run, "nobody/no-such-model is neither in the local cache nor to be had from the hub", *call)


def test_gguf_of_another_architecture_and_cut_short(run, tmp_path):
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(str(path), "bert")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(run, "got 'bert'", CONVERT, path, tmp_path / "out")
    path.write_bytes(path.read_bytes()[:60])
    refused(run, "other.gguf can't be read as GGUF, it may be cut short", CONVERT, path, tmp_path / "out")
