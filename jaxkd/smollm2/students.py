"""Where students start: at a larger model, at some of its layers, at a checkpoint, or at fresh weights of any shape."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxkd import checks
from jaxkd.policy import Params
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.network import Network


@dataclass(frozen=True)
class Start:
    """Where a student starts: at the base itself unless one of the two is given.

    Attributes:
      layers: how many of the base's layers it keeps, evenly spaced; or which, in increasing order.
      source: a checkpoint, any source that `weights.load` takes.
    """

    layers: int | tuple[int, ...] | None = None
    source: str | None = None

    @classmethod
    def parse(cls, spec: str) -> "Start":
        """From a specification: "same", "layers:N" (so many), "layers:0,7,29" (these, from 0), or a source.

        Raises:
          ValueError: on layers that are neither a whole number of at least 1 nor a list in increasing order.
        """
        if spec == "same":
            return cls()
        if not spec.startswith("layers:"):
            return cls(source=spec)
        try:
            layers = tuple(int(number) for number in spec.partition(":")[2].split(","))
        except ValueError:
            raise ValueError(
                f"{spec!r} must end in a number of layers (layers:18), or in the layers themselves (layers:0,7,29)"
            ) from None
        if len(layers) > 1:
            _check_order(layers)
            return cls(layers=layers)
        checks.whole("layers", layers[0], least=1)
        return cls(layers=layers[0])

    def check(self, spec: str, num_layers: int) -> None:
        """Raise ValueError, by the specification, where a base of so many layers lacks what is to be kept of them."""
        if isinstance(self.layers, tuple):
            checks.whole(f"the last layer in {spec!r}", self.layers[-1], least=0, most=num_layers - 1)
        elif self.layers is not None:
            checks.whole(f"layers of the base in {spec!r}", self.layers, least=1, most=num_layers)

    def of(self, base: Network) -> Network:
        """The student, before it has learned anything."""
        if self.source is not None:
            return base.setting.load(self.source)
        if self.layers is None:
            return base
        return Network(*keep_layers(base.config, base.params, self.layers), base.setting)


def _check_order(layers: Sequence[int]) -> None:
    for layer in layers:
        checks.whole("a layer kept", layer, least=0)
    if list(layers) != sorted(set(layers)):
        raise ValueError(f"the layers kept must be in increasing order, each once; got {list(layers)}")


def spaced_layers(num_layers: int, kept: int) -> tuple[int, ...]:
    """Which layers of `num_layers` to keep: evenly spaced, the first and the last among them (one: the first).

    Raises:
      ValueError: for fewer than one, or more than there are.
    """
    checks.whole("the number of layers kept", kept, least=1, most=num_layers)
    if kept == 1:
        return (0,)
    # Whole numbers alone: rounding halves to even would space some counts unevenly.
    return tuple((2 * i * (num_layers - 1) + kept - 1) // (2 * (kept - 1)) for i in range(kept))


def keep_layers(config: Config, params: Params, layers: int | Sequence[int]) -> tuple[Config, Params]:
    """A student with some of a model's layers, everything else as it is; its parameters are copies.

    Args:
      config: the larger model's shape.
      params: its parameters.
      layers: how many, evenly spaced; or which, in increasing order.

    Raises:
      ValueError: more layers than there are, or a list that is empty, out of order or names a layer twice.
    """
    if isinstance(layers, int):
        layers = spaced_layers(config.num_layers, layers)
    if len(layers) == 0:
        raise ValueError("a student must keep at least one layer; got an empty list")
    for layer in layers:
        checks.whole("a layer kept", layer, least=0, most=config.num_layers - 1)
    _check_order(layers)
    chosen = np.asarray(layers)
    student = {name: jax.tree.map(jnp.copy, part) for name, part in params.items() if name != "layers"}
    student["layers"] = jax.tree.map(lambda leaf: leaf[chosen], params["layers"])
    return replace(config, num_layers=len(layers)), student


def fresh(config: Config, key: jax.Array, dtype=jnp.float32) -> Params:
    """Random parameters of any shape, as a model starts its training: kernels normal, norms of one."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), make_model(config).init(key))
