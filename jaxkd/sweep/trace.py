"""What a function computes, as a number: its trace without what depends on the process, the devices or the names.

Two functions of one digest make the same numbers. The digest is the same in every process, on any kind and number of
devices, and after comments or names were changed, unless a function goes through a set, whose order no two processes
share; it is of one version of jax alone.
"""

import enum
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

_OF_THE_EXECUTION = re.compile("sharding|layout|mesh|specs|manual_axes|donated|keep_unused|inline|compiler_options")
"""Parameters of operations that say where and how they are carried out, and change no number."""


def digest(traced: ClosedJaxpr | Jaxpr, constants: Sequence = ()) -> str:
    """Hash of a trace, whatever it closes over included; host callbacks count only as being there.

    Args:
      traced: from `jax.make_jaxpr`, or a part of it.
      constants: arrays that the part was given from outside.
    """
    digests = _Digests()
    return _hash(digests.of(traced), *map(digests.told, constants))[:16]


def digest_of_all(digests: Iterable[str]) -> str:
    """One digest of several, in whichever order and however often they come."""
    return _hash(*sorted(set(digests)))[:16]


class _Digests:
    """Digests of traces inside a trace, each made once: they are shared."""

    def __init__(self):
        self._known: dict[int, str] = {}

    def of(self, traced: ClosedJaxpr | Jaxpr) -> str:
        """Of one, with the constants that it closes over."""
        jaxpr, constants = (traced.jaxpr, traced.consts) if isinstance(traced, ClosedJaxpr) else (traced, ())
        if id(jaxpr) not in self._known:
            self._known[id(jaxpr)] = _hash("\n".join(self._lines(jaxpr)))
        own = self._known[id(jaxpr)]
        return _hash(own, *map(self.told, constants)) if constants else own

    def _lines(self, jaxpr: Jaxpr) -> Iterator[str]:
        """One a line: what goes in, every operation, what comes out; values are numbered as they are made."""
        numbers: dict[Any, int] = {}

        def made(variables):
            return [f"{numbers.setdefault(one, len(numbers))}:{_type(one.aval)}" for one in variables]

        def used(atoms):
            return [self._literal(one) if isinstance(one, Literal) else str(numbers[one]) for one in atoms]

        yield " ".join(made([*jaxpr.constvars, *jaxpr.invars]))
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            parameters = {
                key: self.told(value)
                for key, value in sorted(equation.params.items())
                if not _OF_THE_EXECUTION.search(key) and not (key == "name" and name in ("jit", "pjit"))
            }
            inputs = used(equation.invars)
            yield f"{made(equation.outvars)} = {name} {parameters} {inputs}"
        yield " ".join(used(jaxpr.outvars))

    def _literal(self, literal: Literal) -> str:
        value = np.asarray(literal.val)
        if value.dtype != literal.aval.dtype:
            value = value.astype(literal.aval.dtype)
        return f"{_type(literal.aval)}{value.tobytes().hex()}"

    def told(self, value: Any) -> str:
        """A parameter or constant as a text that another process would give it too."""
        if isinstance(value, ClosedJaxpr | Jaxpr):
            return self.of(value)
        if isinstance(value, jax.Array | np.ndarray):
            array = as_numpy(value)
            return f"{array.dtype}{array.shape}{_hash(array.tobytes())}"
        if isinstance(value, np.generic):
            return repr(value.item())
        if isinstance(value, Mapping):
            return f"{[(str(key), self.told(one)) for key, one in value.items()]}"
        if isinstance(value, tuple | list):
            return f"{[self.told(one) for one in value]}"
        if isinstance(value, set | frozenset):
            return f"{sorted(self.told(one) for one in value)}"
        # Derivatives that stand beside what was traced, and callbacks.
        if not isinstance(value, enum.Enum) and (callable(value) or hasattr(value, "call_wrapped")):
            return "function"
        return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def as_numpy(leaf: Any) -> np.ndarray:
    """An array on the host, of a type that numpy itself knows; keys as their words."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    return array if array.dtype.kind in "biufc" else array.astype(np.float32)


def _type(aval: Any) -> str:
    return f"{getattr(aval, 'dtype', type(aval).__name__)}{[*getattr(aval, 'shape', ())]}"


def _hash(*parts: str | bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
        found.update(b"\n")
    return found.hexdigest()
