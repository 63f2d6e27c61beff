"""What a stage is given to say what it does, and the count of what it spends."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxkd import durable
from jaxkd.smollm2 import cost
from jaxkd.smollm2.cost import Cost
from jaxkd.smollm2.network import Network


@dataclass
class Workshop:
    """What every stage is given: where to say what is done, and what was spent.

    Attributes:
      progress: bars.
      sinks: of metrics, beside the file.
      root: run folder, to which stages are named; None names them by their own folder.
      cost: spent by the stage so far.
    """

    progress: durable.Progress
    sinks: tuple = ()
    root: Path | None = None
    cost: Cost = Cost()
    _since: float = 0.0

    def begin(self) -> None:
        """Begin a stage: nothing is spent."""
        self.cost, self._since = Cost(), time.perf_counter()

    def spend(self, **spent: float) -> None:
        """Add to what was spent."""
        self.cost = self.cost.add(Cost(**spent))

    def spent(self) -> dict:
        """All that was spent, with the seconds since the stage began or went on."""
        now = time.perf_counter()
        self.spend(seconds=now - self._since)
        self._since = now
        return self.cost.to_dict()

    def restore(self, spent: dict) -> None:
        """Go on from what a checkpoint says was spent."""
        self.cost = Cost.from_dict(spent)

    def log(self, folder: Path) -> durable.Log:
        """The log of a stage."""
        name = folder.name if self.root is None else folder.relative_to(self.root).as_posix()
        return durable.Log(name, folder / durable.METRICS, self.sinks)


class Coster:
    """Says what a stage does, in tokens and model FLOPs."""

    def __init__(self, workshop: Workshop, model: Network, other: Network):
        self.workshop, self.model, self.other = workshop, model, other

    def _flops(self, network: Network, x, of: Callable = cost.forward_flops) -> float:
        lengths = np.asarray(x.mask).sum(axis=1)
        return of(network.config, int(lengths.sum()), cost.mean_context(lengths))

    def sampled(self, x, by: Network | None = None) -> None:
        """Texts were drawn."""
        network = by or self.model
        self.workshop.spend(tokens_sampled=int(x.completion_mask.sum()), model_flops=self._flops(network, x))

    def scored(self, x, by: Network | None = None) -> None:
        """Log-probabilities were computed."""
        network = by or self.model
        self.workshop.spend(tokens_scored=int(x.completion_mask.sum()), model_flops=self._flops(network, x))

    def trained(self, x, updates: int = 1, *, teacher: bool = False) -> None:
        """Updates were made on a batch: a forward and a backward pass each, and the teacher's forward pass."""
        tokens = int(np.asarray(x.completion_mask).sum()) * updates
        flops = self._flops(self.model, x, cost.training_flops) + (self._flops(self.other, x) if teacher else 0)
        self.workshop.spend(tokens_trained=tokens, model_flops=updates * flops)
