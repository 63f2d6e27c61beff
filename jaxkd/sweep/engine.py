"""Many independent runs of a pure function, over all devices.

`compile_runs` maps a function over its runs in one device call. `run_sweep` goes through a grid of any size block by
block, into a store, with the runs of a block computed in chunks that fit the cache; it can be killed at any moment and
goes on when it is called again.
"""

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxkd import checks
from jaxkd.sweep import hosts
from jaxkd.sweep import store as stores
from jaxkd.sweep.cache import CacheUse, use_compile_cache
from jaxkd.sweep.grid import Block, Grid
from jaxkd.sweep.store import Label, Store, Template


def cpu_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def use_cpu_cores_as_devices(count: int | None = None) -> None:
    """Make each core of the CPU a device of its own; call it before jax starts. Has no effect on GPUs and TPUs.

    One shard of the run axis a core is faster than one device with a thread pool: the runs' arrays are too small to
    be split inside an operation.
    """
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", count or cpu_cores())


_QUICK_COMPILE = {"xla_cpu_use_fusion_emitters": False, "xla_backend_optimization_level": 1}


class Compiled(NamedTuple):
    """A compiled mapping over runs.

    Attributes:
      call: `(arguments, shared) -> results`, runs leading, on the host.
      seconds: time to trace and compile (s).
      start: as `call`, but returns at once what `fetch` takes: the devices go on meanwhile.
      fetch: waits for what was started; results with runs leading, on the host.
    """

    call: Callable[[tuple, tuple], Any]
    seconds: float
    start: Callable[[tuple, tuple], Any]
    fetch: Callable[[Any], Any]


def compile_runs(
    function: Callable,
    arguments: tuple,
    shared: tuple = (),
    *,
    batch_size: int,
    on_batch: Callable[[], None] | None = None,
    devices: Sequence[jax.Device] | None = None,
    quick_compile: bool = False,
) -> Compiled:
    """Compile `function` over the leading run axis of its arguments into one device call.

    Each device takes an equal share of the runs and goes through it in batches: the function is vmapped inside a batch
    and mapped over batches. Runs are repeated to fill the last batch and cut off again; no run's result depends on the
    others in its batch.

    Args:
      function: a pure function of one run's arguments, `(*arguments, *shared) -> pytree of arrays`.
      arguments: pytrees whose leaves all lead with the run axis; arrays, or their shapes and types alone.
      shared: pytrees that all runs share. What a function closes over instead becomes a constant of the program, and
        XLA then spends its compile time on folding it.
      batch_size: runs that a device computes at a time.
      on_batch: called on the host whenever a device has finished a batch, for progress; costs no synchronisation.
      devices: by default all devices of this process.
      quick_compile: spend less on compiling, for few runs; CPUs only. How much slower the code is depends on the
        function: on the benchmark's reference workload 2.7 times.

    Raises:
      ValueError: when `batch_size` is below 1 or there are no runs.
    """
    num_runs = jax.tree.leaves(arguments)[0].shape[0]
    if batch_size < 1 or num_runs < 1:
        raise ValueError(f"batch_size and the number of runs must be at least 1, got {batch_size} and {num_runs}")
    devices = list(devices or jax.local_devices())
    batch_size = min(batch_size, -(-num_runs // len(devices)))
    num_batches = -(-num_runs // (batch_size * len(devices)))
    mesh = _mesh(devices)
    over_runs, everywhere = PartitionSpec(None, "runs"), PartitionSpec()
    filled = np.arange(num_batches * batch_size * len(devices)) % num_runs

    def one_batch(batch, shared):
        results = jax.vmap(lambda *own: function(*own, *shared))(*batch)
        if on_batch is not None:
            # The argument makes the callback wait for the batch.
            jax.debug.callback(lambda _: on_batch(), jax.tree.leaves(results)[0].ravel()[0])
        return results

    def all_batches(batches, shared):
        return lax.map(lambda batch: one_batch(batch, shared), batches)

    sharded = jax.shard_map(
        all_batches, mesh=mesh, in_specs=(over_runs, everywhere), out_specs=over_runs, check_vma=False
    )

    def spread(leaf):
        return leaf[filled].reshape(num_batches, batch_size * len(devices), *leaf.shape[1:])

    def place(arguments, shared):
        spread_out = jax.tree.map(spread, arguments)
        return (
            jax.device_put(spread_out, NamedSharding(mesh, over_runs)),
            jax.device_put(shared, NamedSharding(mesh, everywhere)),
        )

    def shape_of(leaf, spec):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.eval_shape(lambda arguments: jax.tree.map(spread, arguments), arguments)
    begin = time.perf_counter()
    compiled = (
        jax.jit(sharded)
        .lower(
            jax.tree.map(lambda leaf: shape_of(leaf, over_runs), shapes),
            jax.tree.map(lambda leaf: shape_of(leaf, everywhere), jax.eval_shape(lambda: shared)),
        )
        .compile(compiler_options=_QUICK_COMPILE if quick_compile and devices[0].platform == "cpu" else None)
    )
    seconds = time.perf_counter() - begin

    def start(arguments, shared=()):
        return compiled(*place(arguments, shared))

    def fetch(results):
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_runs], jax.device_get(results))

    return Compiled(lambda arguments, shared=(): fetch(start(arguments, shared)), seconds, start, fetch)


def _mesh(devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    return jax.make_mesh((len(devices),), ("runs",), axis_types=(AxisType.Auto,), devices=devices)


class Report(NamedTuple):
    """What a call of `run_sweep` did, in this process.

    Attributes:
      path: folder of the store.
      runs: runs computed by this call.
      runs_before: runs of this process's blocks that were there already.
      failed: runs of this call whose variable `failed` is true anywhere (0 where there is no such variable).
      chunk: runs that a device computed at a time.
      devices: devices that were used.
      programs: programs that were needed, one a static combination and each chunk tried.
      cache_hits: how many of them came from the persistent compile cache.
      compile_seconds: time to trace and compile or load the first program (s).
      seconds: time of the whole call (s).
    """

    path: Path
    runs: int
    runs_before: int
    failed: int
    chunk: int
    devices: int
    programs: int
    cache_hits: int
    compile_seconds: float
    seconds: float

    def __str__(self):
        """One line for the end of a script."""
        before = f" ({self.runs_before} were there)" if self.runs_before else ""
        failed = f", {self.failed} failed" if self.failed else ""
        devices = f"{self.devices} device{'s' if self.devices > 1 else ''}"
        return (
            f"{self.runs} runs{before}{failed} in {self.seconds:.1f} s, {self.runs / self.seconds:.1f} runs/s, "
            f"{self.chunk} a chunk on {devices}; {self.programs} programs, {self.cache_hits} from the compile cache"
        )


def run_sweep(
    function: Callable,
    grid: Grid,
    store: Path,
    *,
    shared: tuple = (),
    settings: Callable[[Block], Mapping[str, Hashable]] | None = None,
    finish: Callable[[Any, Block], Mapping[str, np.ndarray]] | None = None,
    labels: Mapping[str, Label] | None = None,
    coordinates: Mapping[str, Sequence] | None = None,
    configuration: Mapping | None = None,
    chunk: int | None = None,
    devices: int | None = None,
    overwrite: bool = False,
    compile_cache: Path | bool = True,
    quick_compile: bool = False,
    progress: bool = True,
) -> Report:
    """Run a function at every point of a grid and keep the results in a store; called again, go on where it was.

    A run depends on its seed, its hyperparameters and what all share, and on nothing else: neither chunks nor devices,
    blocks, order or resuming change a random number.

    Args:
      function: pure, of one run: `(key, hyperparameters, *shared, **static) -> pytree of arrays`. The key is
        `jax.random.key(seed)`; `hyperparameters` holds a traced scalar by name of each traced axis; `static` holds the
        value of each static axis, and the block's settings. It is traced in threads: set jax up by `jax.config.update`,
        which reaches them, and not by context managers.
      grid: which runs.
      store: folder of the store. Every process of a cluster must see it under this name.
      shared: pytrees of arrays that all runs share; what a function closes over becomes a constant of the program.
      settings: more static keywords of the function, by block; they may shape the program (a padding, say) but must
        change no result. Blocks of equal settings share one program.
      finish: turns a block's results, runs leading, into arrays by variable name, on the host. By default the leaves
        are named by their paths in the pytree.
      labels: long names, units and own dimensions, by variable or axis.
      coordinates: values along the variables' own dimensions.
      configuration: what the results depend on beside the grid, as plain JSON; a store of another one is refused.
      chunk: runs that a device computes at a time; measured when not given, and kept in the store.
      devices: how many of this process's devices to use; by default all.
      overwrite: replace a store of another sweep, or begin this one anew.
      compile_cache: folder of the persistent compile cache; True for the usual one, False for none.
      quick_compile: as for `compile_runs`.
      progress: show runs done, runs a second and time left on stderr.

    Raises:
      ValueError: on a chunk or a number of devices out of range, or a chunk other than the store's.
      FileExistsError: when something else is at `store`.
      OSError: when the store cannot be written; what was finished stays readable.
    """
    begin = time.perf_counter()
    chosen = _choose_devices(devices)
    if chunk is not None:
        checks.whole("--chunk", chunk, least=1)
    cache = use_compile_cache(compile_cache)
    sweep = _Sweep(function, grid, shared, settings, finish, chosen, quick_compile)
    template = Template(grid, sweep.variables(), labels or {}, coordinates or {})
    opened = _open(sweep, template, Path(store), dict(configuration or {}), chunk, overwrite)
    with hosts.together("finish the sweep"):
        runs, before, failed = _compute(sweep, opened, cache, progress)
    return Report(
        path=Path(store),
        runs=runs,
        runs_before=before,
        failed=failed,
        chunk=sweep.fitting(opened.chunk),
        devices=len(chosen),
        programs=len(sweep.programs),
        cache_hits=min(cache.hits, len(sweep.programs)),
        compile_seconds=sweep.first_compile_seconds,
        seconds=time.perf_counter() - begin,
    )


def _choose_devices(count: int | None) -> list[jax.Device]:
    there = jax.local_devices()
    if count is not None:
        checks.whole(f"--devices (this process has {len(there)})", count, least=1, most=len(there))
    return there[:count]


class _Sweep:
    """A function over a grid: its programs, each compiled once, and its results by name."""

    def __init__(self, function, grid, shared, settings, finish, devices, quick_compile):
        self.grid, self.devices, self._quick_compile = grid, devices, quick_compile
        self.programs: dict[tuple, Future[Compiled]] = {}
        self._runs: dict[tuple, Callable] = {}
        self.first_compile_seconds = 0.0
        self._function, self._settings = function, settings
        # Placed once, or every batch would copy it to every device again.
        self._shared = jax.device_put(shared, NamedSharding(_mesh(devices), PartitionSpec()))
        self._finish = finish or (lambda results, block: named(results))
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="compile")

    def static_of(self, block: Block) -> dict[str, Hashable]:
        """All static keywords of a block."""
        own = dict(self._settings(block)) if self._settings is not None else {}
        return {**block.static, **own}

    def one_run(self, static: Mapping) -> Callable:
        """The function of one run, from numbers that a program takes; traced once for all programs that map it."""
        key = tuple(sorted(static.items()))
        if key not in self._runs:

            def run(hyperparameters, seed, *shared):
                return self._function(jax.random.key(seed), hyperparameters, *shared, **static)

            self._runs[key] = jax.jit(run)
        return self._runs[key]

    def variables(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of one run's values, by name; traces the function but computes nothing."""
        block = self.grid.block(0)
        run = self.one_run(self.static_of(block))

        def first(arguments, shared):
            arguments = jax.tree.map(lambda leaf: leaf[0], arguments)
            return jax.tree.map(lambda leaf: leaf[None], run(*arguments, *shared))

        # Over the same mesh as the programs, or jax would trace the function again for them.
        runs, everywhere = PartitionSpec("runs"), PartitionSpec()
        over_mesh = jax.shard_map(
            first, mesh=_mesh(self.devices), in_specs=(runs, everywhere), out_specs=runs, check_vma=False
        )
        arguments = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((len(self.devices), *leaf.shape[1:]), leaf.dtype),
            (block.axes, block.seeds),
        )
        outcome = jax.eval_shape(over_mesh, arguments, self._shared)
        zeros = jax.tree.map(lambda leaf: np.zeros((block.num_runs, *leaf.shape[1:]), leaf.dtype), outcome)
        return {
            name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
            for name, array in self.finish(zeros, block).items()
        }

    def finish(self, results: Any, block: Block) -> dict[str, np.ndarray]:
        """Results by variable name, runs leading."""
        return {name: np.asarray(array) for name, array in self._finish(results, block).items()}

    def fitting(self, chunk: int) -> int:
        """A chunk, but no more than a device has of a block: it would only repeat runs."""
        return min(chunk, -(-math.prod(self.grid.block_shape) // len(self.devices)))

    def program(self, block: Block, chunk: int) -> Future[Compiled]:
        """The program of a block, begun to be compiled when it is asked for first."""
        static = self.static_of(block)
        key = (chunk, *sorted(static.items()))
        if key not in self.programs:
            runs = chunk * len(self.devices)
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((runs, *leaf.shape[1:]), leaf.dtype), (block.axes, block.seeds)
            )
            self.programs[key] = self._pool.submit(
                compile_runs,
                self.one_run(static),
                shapes,
                self._shared,
                batch_size=chunk,
                devices=self.devices,
                quick_compile=self._quick_compile,
            )
        return self.programs[key]

    def start(self, program: Compiled, block: Block, begin: int, runs: int) -> Any:
        """Begin to compute `runs` runs of a block; the last ones are repeated where the block has not so many."""
        places = np.minimum(np.arange(begin, begin + runs), block.num_runs - 1)
        arguments = jax.tree.map(lambda leaf: leaf[places], (block.axes, block.seeds))
        return program.start(arguments, self._shared)

    def close(self) -> None:
        """End the threads; programs not begun are not compiled."""
        self._pool.shutdown(cancel_futures=True)


def named(results: Any) -> dict[str, np.ndarray]:
    """The leaves of a pytree by their paths, joined by dots; a lone array is called `result`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(results)
    return {jax.tree_util.keystr(path, simple=True, separator=".") or "result": leaf for path, leaf in leaves}


def _open(sweep, template, path, configuration, chunk, overwrite) -> Store:
    """Go on with the store that is there, or make one; in a cluster, process 0 makes it while the others wait."""
    with hosts.together("open the store"):
        held = None if overwrite else stores.resume(path, template, configuration)
        if held is not None and chunk not in (None, held.chunk):
            raise ValueError(
                f"--chunk must be {held.chunk}, with which {path} was begun, or be left out; got {chunk} "
                "(--overwrite begins anew)"
            )
        if held is not None:
            stores.check_writable(path)
        elif jax.process_index() == 0:
            stores.check_replaceable(path, overwrite)
            stores.check_writable(path)
            found = _measure_chunk(sweep) if chunk is None else chunk
            stores.create(path, template, configuration, chunk=found, overwrite=overwrite)
    return held or Store(path)


_CHUNKS = (2, 8, 32, 128, 512, 2048)


def _measure_chunk(sweep: _Sweep) -> int:
    """Runs a device to compute at a time: wider chunks are tried while they pay and trying is cheap.

    Wide chunks amortise the overhead of small operations until a chunk's arrays leave the cache. Trying one costs a
    compilation. It is tried while that is less than half of what it would save if it gained as much as the last one
    did; the first gain is taken to be a fifth.
    """
    block, best, fastest, gain = sweep.grid.block(0), 0, np.inf, 0.2
    for chunk in sorted({sweep.fitting(chunk) for chunk in _CHUNKS}):
        begin = time.perf_counter()
        program = sweep.program(block, chunk).result()
        sweep.first_compile_seconds = sweep.first_compile_seconds or program.seconds
        seconds = _seconds_a_run(sweep, program, block, chunk)
        if seconds > 0.95 * fastest:
            break
        if best:
            gain = 1 - seconds / fastest
        best, fastest = chunk, seconds
        whole_sweep = seconds * sweep.grid.size / jax.process_count()
        if time.perf_counter() - begin > 0.5 * gain * whole_sweep:
            break
    return best


def _seconds_a_run(sweep, program, block, chunk) -> float:
    runs, seconds = chunk * len(sweep.devices), []
    # The first call warms up: a short one is repeated.
    while len(seconds) < 3 and sum(seconds) < 0.3:
        begin = time.perf_counter()
        program.fetch(sweep.start(program, block, 0, runs))
        seconds.append(time.perf_counter() - begin)
    return min(seconds) / runs


def _compute(sweep: _Sweep, store: Store, cache: CacheUse, progress: bool) -> tuple[int, int, int]:
    """Compute what is missing of this process's blocks; runs computed, runs that were there, runs failed."""
    done = store.done()
    own = hosts.own_share(sweep.grid.num_blocks)
    missing = [index for index in own if not done[index]]
    total = sum(sweep.grid.block(index).num_runs for index in own)
    before = total - sum(sweep.grid.block(index).num_runs for index in missing)
    writing, failed, computed = deque(), 0, 0
    bar = tqdm(
        desc=store.path.stem,
        total=total,
        initial=before,
        unit="run",
        smoothing=0.1,
        file=sys.stderr,
        disable=not progress or jax.process_index() > 0,
    )
    try:
        with bar, ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as writer:
            for block, results in _results(sweep, missing, sweep.fitting(store.chunk), bar, cache):
                values = sweep.finish(results, block)
                failed += _count_failed(values)
                computed += block.num_runs
                writing.append(writer.submit(store.write_block, block, values))
                # The writer stays at most two blocks behind: memory does not grow with the number of runs.
                if len(writing) > 2:
                    writing.popleft().result()
            for written in writing:
                written.result()
    finally:
        sweep.close()
    return computed, before, failed


def _results(sweep, indices, chunk, bar, cache) -> Iterator[tuple[Block, Any]]:
    """Results of every block, on the host, in order. The devices are one batch ahead of what is fetched."""
    runs = chunk * len(sweep.devices)
    # Programs are asked for in the order of their first block: later ones compile while earlier blocks run.
    for index in indices:
        sweep.program(sweep.grid.block(index), chunk)
    blocks = map(sweep.grid.block, indices)
    batches = ((block, begin) for block in blocks for begin in range(0, block.num_runs, runs))
    ahead: deque = deque()
    parts: list = []

    def collect():
        block, begin, program, started = ahead.popleft()
        fresh = min(runs, block.num_runs - begin)
        parts.append(jax.tree.map(lambda leaf: leaf[:fresh], program.fetch(started)))
        bar.update(fresh)
        if begin + fresh < block.num_runs:
            return None
        whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        parts.clear()
        return block, whole

    for block, begin in batches:
        program = _ready(sweep, block, chunk, bar, cache)
        ahead.append((block, begin, program, sweep.start(program, block, begin, runs)))
        if len(ahead) > 1 and (found := collect()) is not None:
            yield found
    while ahead:
        if (found := collect()) is not None:
            yield found


def _ready(sweep, block, chunk, bar, cache) -> Compiled:
    """A block's program, waited for where it is still being compiled."""
    future = sweep.program(block, chunk)
    if not future.done():
        bar.set_postfix_str("compiling")
    program = future.result()
    sweep.first_compile_seconds = sweep.first_compile_seconds or program.seconds
    bar.set_postfix_str(f"{cache.hits} of {len(sweep.programs)} programs from the cache", refresh=False)
    return program


def _count_failed(values: Mapping[str, np.ndarray]) -> int:
    failed = values.get("failed")
    return 0 if failed is None else int(np.any(failed.reshape(len(failed), -1), axis=1).sum())
