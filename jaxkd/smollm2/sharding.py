"""Layout over several devices: a mesh with the axes `data` and `model`, and rules by the names of parameters.

`data` cuts the batch, and every parameter and its optimizer state as well (FSDP: gathered where it is used). `model`
cuts heads, the MLP's width and the vocabulary (tensor parallel). Rules name axes of the arrays, never devices, and
an axis that its mesh axis does not divide stays whole; except for the heads, whose cutting is what `model` is for.

Several hosts. A mesh may span the devices of several processes (jax.distributed): `weights.load` and
`weights.save_pretrained`, a model's functions and training steps work over it, called alike in every process. What is
done on the host batch by batch (`network`: drawing, scoring, fingerprints) and the scripts take the devices of one.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxkd import checks
from jaxkd.policy import Params
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import DATA, MODEL, make_model, spec_of

# What each axis of a leaf is: L layers, V vocabulary, D width, K heads of keys, G queries of each, N, F of the MLP.
AXES = {
    "embedding": "VD",
    "head": "VD",
    "norm.scale": "D",
    "layers.attention_norm.scale": "LD",
    "layers.mlp_norm.scale": "LD",
    "layers.attention.qkv": "LDKgN",
    "layers.attention.out": "LKGND",
    "layers.mlp.gate_up": "LD2F",
    "layers.mlp.down": "LFD",
}
RULES = {"V": MODEL, "K": MODEL, "F": MODEL, "D": DATA}


def make_mesh(data: int | None = None, model: int = 1, devices: Any = None) -> Mesh:
    """A mesh of `data` × `model` devices; by default `data` takes all that `model` leaves.

    Raises:
      ValueError: where the product is not the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    checks.whole("model", model, least=1)
    data = len(devices) // model if data is None else data
    checks.whole("data", data, least=1)
    if data * model != len(devices):
        raise ValueError(f"a mesh of {data} × {model} needs {data * model} devices; there are {len(devices)}")
    return Mesh(np.asarray(devices).reshape(data, model), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto))


def mesh_of_all_devices(tensor_parallel: int = 1) -> Mesh | None:
    """A mesh with so many devices on `model` and the rest on `data`; None where there is one device.

    Raises:
      ValueError: where their number does not divide that of the devices, or these are of several processes.
    """
    check_one_process(jax.process_count())
    devices = jax.device_count()
    if devices % tensor_parallel:
        raise ValueError(f"--tensor-parallel must divide the number of devices, {devices}; got {tensor_parallel}")
    return make_mesh(model=tensor_parallel) if devices > 1 else None


def check_one_process(count: int) -> None:
    """Raise ValueError where devices of so many processes would have to be used as one's."""
    if count > 1:
        raise ValueError(
            f"language models are drawn from and scored on the devices of one process, and here are those of {count} "
            "(jax.distributed): start each process without it, with the devices of its host. Processes with one run "
            "folder share the models of smollm2_order.py out; sample.py takes a --seed and an --out for each"
        )


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Raise ValueError where the mesh's axis `model` does not divide the heads, or the axes have other names."""
    if set(mesh.axis_names) != {DATA, MODEL}:
        raise ValueError(f"the mesh must have the axes {DATA!r} and {MODEL!r}; got {mesh.axis_names}")
    size = mesh.shape[MODEL]
    if config.num_kv_heads % size:
        raise ValueError(
            f"the mesh's axis {MODEL!r} of {size} devices does not divide the {config.num_kv_heads} heads of keys"
        )


def param_specs(config: Config, mesh: Mesh) -> Params:
    """The pytree of parameters as `PartitionSpec`s."""
    check_mesh(config, mesh)

    def spec(path, leaf):
        letters = AXES[".".join(key.key for key in path)]
        return spec_of(_axis(letter, size, mesh) for letter, size in zip(letters, leaf.shape, strict=True))

    return jax.tree_util.tree_map_with_path(spec, make_model(config).shapes())


def _axis(letter: str, size: int, mesh: Mesh) -> str | None:
    name = RULES.get(letter)
    return name if name is not None and mesh.shape[name] > 1 and size % mesh.shape[name] == 0 else None


def param_shardings(config: Config, mesh: Mesh) -> Params:
    """The pytree of parameters as `NamedSharding`s."""
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(config, mesh), is_leaf=is_spec)


def state_shardings(mesh: Mesh, params: Any, state: Any) -> Any:
    """Shardings of an optimizer's state: what is shaped like a parameter lies as it does, the rest on every device.

    Args:
      mesh: the mesh.
      params: what is trained, laid out, as arrays or shapes.
      state: the optimizer's state, likewise; subtrees of it that have the parameters' keys are moments.
    """
    of_params = {_names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def place(path, leaf):
        like = of_params.get(_names(path))
        return NamedSharding(mesh, PartitionSpec()) if like is None or like.shape != leaf.shape else like.sharding

    return jax.tree_util.tree_map_with_path(place, state)


def _names(path) -> tuple[str, ...]:
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose leading axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(DATA))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Lay a pytree of arrays out over `data` by their leading axis.

    Raises:
      ValueError: where the axis is not divided.
    """
    size = mesh.shape[DATA]
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % size:
            raise ValueError(f"a batch of {leaf.shape[0]} is not divided by the mesh's axis {DATA!r} of {size} devices")
    return jax.device_put(batch, batch_sharding(mesh))
