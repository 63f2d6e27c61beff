"""What a stage is given to say what it does, and the count of what it spends."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    @contextmanager
    def counted(self, total: int, what: str, done: int = 0) -> Iterator[Callable[[int, int], None]]:
        """A bar of texts, which what is given tells of numbers of texts and of tokens."""
        with self.progress.bar(total, done, what, "text") as bar:
            yield lambda texts, tokens: self.progress.tokens(bar, tokens, texts)

    def log(self, folder: Path) -> durable.Log:
        """The log of a stage."""
        name = folder.name if self.root is None else folder.relative_to(self.root).as_posix()
        return durable.Log(name, folder / durable.METRICS, self.sinks)


def charged(workshop: Workshop, target: Network, oracle: Callable) -> Callable:
    """An oracle that scores texts by the target, and says so."""

    def counted(texts, x):
        Coster(workshop, target).scored(x)
        return oracle(texts, x)

    return counted


class Coster:
    """Says what a stage does, in tokens and model FLOPs: by its model, or where a teacher is given by both."""

    def __init__(self, workshop: Workshop, model: Network, teacher: Network | None = None):
        self.workshop, self.model, self.teacher = workshop, model, teacher

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

    def trained(self, x, updates: int = 1) -> None:
        """Updates were made on a batch: a forward and a backward pass each, and the forward pass of a teacher."""
        tokens = int(np.asarray(x.completion_mask).sum()) * updates
        flops = self._flops(self.model, x, cost.training_flops)
        flops += 0 if self.teacher is None else self._flops(self.teacher, x)
        self.workshop.spend(tokens_trained=tokens, model_flops=updates * flops)
