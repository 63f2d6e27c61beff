"""Training that survives a kill: a host loop over pure steps, with checkpoints, a log of metrics and progress.

    folder/checkpoint/      the last state (orbax), deleted once the stage is finished
    folder/metrics.jsonl    one line a step
    folder/record.json      written last: the stage is finished

A step is a function of the state and the step's number alone, so that a loop which goes on after the last checkpoint
ends with the very numbers of one that was never stopped. What had been logged after that checkpoint is taken back.
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxkd import __version__, files

RECORD = "record.json"
METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint"
CALLS = "calls.jsonl"

Step = Callable[[Any, int], tuple[Any, dict[str, float], bool]]
"""`(state, number) -> (state, metrics, whether to stop)`; the state is a pytree of arrays."""


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    with files.whole(path) as partial:
        partial.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """A file of JSON."""
    return json.loads(path.read_text(encoding="utf-8"))


def entries(path: Path) -> list[dict]:
    """What a stage logged, a step each; not what follows a line that is cut short, as one being written may be."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def read_record(folder: Path) -> dict | None:
    """What a finished stage wrote last; None where it is not finished."""
    path = folder / RECORD
    return read_json(path) if path.exists() else None


@dataclass(frozen=True)
class Log:
    """Where metrics go: always to a file of JSON lines, and to whoever else was asked for.

    Attributes:
      stage: name that every line carries.
      path: of the file.
      sinks: called with stage, step and metrics.
    """

    stage: str
    path: Path
    sinks: tuple[Callable[[str, int, Mapping[str, float]], None], ...] = ()

    def begin(self, step: int) -> None:
        """Take back the lines from a step on, and one that was cut short."""
        if not self.path.exists():
            return
        kept = [json.dumps(entry) + "\n" for entry in entries(self.path) if entry["step"] < step]
        with files.whole(self.path) as partial:
            partial.write_text("".join(kept), encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": self.stage, "step": step, **metrics}) + "\n")
        for sink in self.sinks:
            sink(self.stage, step, metrics)


def wandb_sink(project: str, name: str, configuration: dict) -> Callable:
    """Send metrics to Weights & Biases.

    Raises:
      ValueError: when wandb is not installed, or can't begin, as without a login.
    """
    try:
        import wandb
    except ImportError:
        raise ValueError("--wandb needs wandb: pip install 'jaxkd[wandb]'") from None
    try:
        run = wandb.init(project=project, name=name, config=configuration)
    except wandb.Error as error:
        raise ValueError(f"--wandb {project}: {error}") from None
    # Every stage counts its steps from 0, and one that goes on goes back to its checkpoint: the run's own count can't.
    return lambda stage, step, metrics: run.log(
        {f"{stage}/{key}": value for key, value in {"step": step, **metrics}.items()}
    )


def tensorboard_sink(folder: Path) -> Callable:
    """Write event files for TensorBoard.

    Raises:
      ValueError: when tensorboardX is not installed.
    """
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs tensorboardX: pip install 'jaxkd[tensorboard]'") from None
    writer = SummaryWriter(str(folder))

    def write(stage, step, metrics):
        for key, value in metrics.items():
            writer.add_scalar(f"{stage}/{key}", value, step)
        writer.flush()

    return write


def sinks(wandb: str | None, tensorboard: bool, folder: Path, configuration: dict) -> tuple[Callable, ...]:
    """Where metrics of a run folder go besides.

    Args:
      wandb: project of Weights & Biases; None for none.
      tensorboard: whether to write event files.
      folder: of the run.
      configuration: what the run is noted with.
    """
    chosen = () if wandb is None else (wandb_sink(wandb, folder.name, configuration),)
    return (*chosen, tensorboard_sink(folder / "tensorboard")) if tensorboard else chosen


@dataclass
class Progress:
    """Bars on stderr: steps with the time left, and tokens a second since the first batch, which may compile.

    Attributes:
      quiet: draw nothing.
      prefix: what the bar says first, e.g. which stage of how many.
      speed: tokens a second; 0 before there is a second batch.
    """

    quiet: bool = False
    prefix: str = ""
    speed: float = field(default=0.0, init=False)
    _tokens: float = field(default=0.0, init=False)
    _begin: float | None = field(default=None, init=False)

    def bar(self, total: int, done: int, what: str, unit: str = "step"):
        """A bar of its own; close it when done."""
        from tqdm import tqdm

        self._tokens, self._begin, self.speed = 0.0, None, 0.0
        words = " · ".join(part for part in (self.prefix, what) if part)
        return tqdm(total=total, initial=done, desc=words, unit=unit, file=sys.stderr, disable=self.quiet)

    def tokens(self, bar, count: float, steps: int = 1) -> None:
        """Count tokens and steps."""
        now = time.perf_counter()
        if self._begin is None:
            self._begin = now
            bar.unpause()
        else:
            self._tokens += count
            self.speed = self._tokens / (now - self._begin)
            bar.set_postfix_str(f"{self.speed:.0f} tokens/s", refresh=False)
        bar.update(steps)


class Checkpoints:
    """The last state of a stage on disk, by orbax: written whole or not at all."""

    def __init__(self, folder: Path):
        """Open a folder, which is made when first written to."""
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self._folder = folder.absolute() / CHECKPOINT
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False, create=True)
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Keep the state before a step, with what is plain JSON."""
        args = self._ocp.args
        self._manager.save(
            step, args=args.Composite(state=args.StandardSave(_as_data(state)), meta=args.JsonSave(meta))
        )

    def restore(self, like: Any) -> tuple[int, Any, dict] | None:
        """The last step, its state laid out as `like`, and its JSON; None where there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        args = self._ocp.args
        shapes = jax.tree.map(_shape_of, _as_data(like))
        found = self._manager.restore(
            step, args=args.Composite(state=args.StandardRestore(shapes), meta=args.JsonRestore())
        )
        return step, _as_state(found["state"], like), found["meta"]

    def close(self) -> None:
        """Close; what was kept stays."""
        self._manager.close()


def _is_key(leaf) -> bool:
    return isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_data(state):
    """Leaves by number, for orbax knows no NamedTuple, and keys as numbers."""
    leaves = jax.tree.leaves(state)
    return {str(i): jax.random.key_data(leaf) if _is_key(leaf) else leaf for i, leaf in enumerate(leaves)}


def _as_state(data, like):
    leaves, structure = jax.tree.flatten(like)
    found = [
        jax.random.wrap_key_data(data[str(i)], impl=jax.random.key_impl(leaf)) if _is_key(leaf) else data[str(i)]
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(structure, found)


def _shape_of(leaf):
    if isinstance(leaf, jax.Array):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
    return np.asarray(leaf)


def train(
    folder: Path,
    state: Any,
    step: Step,
    num_steps: int,
    *,
    log: Log,
    progress: Progress,
    what: str,
    checkpoint_every: int,
    cost: Callable[[], dict] = dict,
    restore_cost: Callable[[dict], None] = lambda cost: None,
) -> Any:
    """Take steps until they are done, from the last checkpoint on if there is one.

    Args:
      folder: the stage's own.
      state: where an unstarted training begins, a pytree of arrays; it may be donated.
      step: see `Step`.
      num_steps: the most steps.
      log: of metrics.
      progress: bars.
      what: the words of the bar.
      checkpoint_every: steps between checkpoints.
      cost: what was spent so far, kept with each checkpoint.
      restore_cost: given it again.

    Returns:
      The last state, of which no checkpoint is kept: save it, then `finish`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder)
    found = checkpoints.restore(state)
    begin = 0
    if found is not None:
        begin, state, meta = found
        restore_cost(meta["cost"])
    log.begin(begin)
    bar = progress.bar(num_steps, begin, what)
    for number in range(begin, num_steps):
        state, metrics, stopped = step(state, number)
        log.write(number, metrics)
        progress.tokens(bar, metrics.get("tokens", 0))
        done = number + 1
        # Nothing is kept after the last step: the caller saves what was made of it.
        if done % checkpoint_every == 0 and done < num_steps and not stopped:
            checkpoints.save(done, state, {"cost": cost()})
        if stopped:
            break
    bar.close()
    checkpoints.close()
    return state


def finish(folder: Path, record: dict) -> None:
    """Say that a stage is finished, and let its checkpoints go."""
    write_json(folder / RECORD, record)
    let_checkpoint_go(folder)


def let_checkpoint_go(folder: Path) -> None:
    """Delete the checkpoint of a finished stage, which a kill right after the record leaves; else nothing."""
    if (folder / RECORD).exists():
        shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder that only one can work in, for as long as the block lasts.

    Raises:
      ValueError: where another process is at it.
    """
    # Beside the folder, which may turn out to be another's.
    with files.claim(folder.with_name(f"{folder.name}.stage"), wait=False) as mine:
        if not mine:
            raise ValueError(f"another process is working in {folder}: wait for it, or choose another --out")
        yield


def check_configuration(folder: Path, configuration: dict, free: Collection[str] = ()) -> None:
    """Make sure that a run folder is free or was begun with this very configuration; write it there.

    Args:
      folder: of the run.
      configuration: what its results depend on.
      free: entries that may change; the file then says what was asked for last.

    Raises:
      ValueError: naming what differs, or a folder that holds something else.
    """
    # Of several processes that begin together, one writes it.
    with files.claim(folder, wait=True):
        _check_configuration(folder, json.loads(json.dumps(configuration, default=str)), free)


def _check_configuration(folder: Path, wanted: dict, free: Collection[str]) -> None:
    path = folder / "config.json"
    if path.exists():
        held = json.loads(path.read_text(encoding="utf-8"))
        asked = held | {name: wanted[name] for name in free}
        differing = files.differences(_flat(asked), _flat(wanted))
        if differing:
            raise ValueError(
                f"{folder} holds a run of another configuration ({'; '.join(differing)}): choose another --out"
            )
        if asked != held:
            write_json(path, asked)
        return
    begun = path.with_name(path.name + files.PARTIAL)
    if folder.exists() and (not folder.is_dir() or {*folder.iterdir()} - {begun}):
        raise ValueError(f"{folder} exists and holds no run of jaxkd: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def note_call(folder: Path, resolved: Mapping[str, Any]) -> None:
    """Add a line to a run folder's calls: the time (UTC), the version, and everything as it was resolved.

    The configuration leaves out what may grow from call to call, and what changes no result.

    Args:
      folder: of the run, which is there and checked.
      resolved: of this call, by name.
    """
    path = folder / CALLS
    now = datetime.now(UTC).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "version": __version__, **resolved}, ensure_ascii=False, default=str)
    # Several processes may begin in one folder, and a kill must leave no half line before those of later calls.
    with files.claim(path, wait=True), files.whole(path) as partial:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        partial.write_text(f"{before}{line}\n", encoding="utf-8")


def check_weights(folder: Path, found: dict[str, str]) -> None:
    """Make sure that a run folder's models are those it began with; note there those it does not know yet.

    Args:
      folder: of the run.
      found: fingerprints by role.

    Raises:
      ValueError: naming the roles whose weights changed under their names: half a run would be of others.
    """
    path = folder / "weights.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known = found.keys() & held.keys()
    if differing := files.differences(*({role: one[role] for role in known} for one in (held, found))):
        raise ValueError(f"the weights behind {folder} are others now ({'; '.join(differing)}): choose another --out")
    if known != found.keys():
        write_json(path, held | found)


def _flat(content: dict, before: str = "") -> dict[str, Any]:
    """A nested dict with dotted names."""
    flat = {}
    for key, value in content.items():
        flat |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return flat
