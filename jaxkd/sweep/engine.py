"""Many independent runs of a pure function, over all devices.

`compile_runs` maps a function over its runs in one device call. `run_sweep` goes through a grid of any size block by
block, into a store, with runs computed in chunks that fit the cache; it can be killed at any moment and goes on when it
is called again.
"""

import itertools
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from jaxkd import checks, device_memory, files, random
from jaxkd.sweep import hosts, trace
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

    def all_batches(batches, shared):
        return lax.map(lambda batch: jax.vmap(lambda *own: function(*own, *shared))(*batch), batches)

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
      process: which process this is, from 0.
      processes: how many share the sweep.
      size: runs of the sweep, those of all processes.
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
    process: int
    processes: int
    size: int

    def __str__(self):
        """One line for the end of a script."""
        runs = f"{self.runs} runs"
        if self.processes > 1:
            runs = f"process {self.process} of {self.processes}: {self.runs} of {self.size} runs"
        before = f" ({self.runs_before} were there)" if self.runs_before else ""
        failed = f", {self.failed} failed" if self.failed else ""
        devices = f"{self.devices} device{'s' if self.devices > 1 else ''}"
        return (
            f"{runs}{before}{failed} in {self.seconds:.1f} s, {self.runs / self.seconds:.1f} runs/s, "
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
    default_chunk: int | None = None,
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
        `jax.random.key(seed, impl="threefry2x32")`; `hyperparameters` holds a traced scalar by name of each traced
        axis; `static` holds the value of each static axis, and the block's settings. It is traced in threads: set jax
        up by `jax.config.update`, which reaches them, and not by context managers.
      grid: which runs.
      store: folder of the store. Every process of a cluster must see it under this name.
      shared: pytrees of arrays that all runs share; what a function closes over becomes a constant of the program.
      settings: more static keywords of the function, by block; they may shape the program (a padding, say) but must
        change no result. Blocks of equal settings share one program.
      finish: turns a block's results, runs leading, into arrays by variable name, on the host. By default the leaves
        are named by their paths in the pytree. What it does is not compared when a sweep goes on.
      labels: long names, units and own dimensions, by variable or axis.
      coordinates: values along the variables' own dimensions.
      configuration: what the results depend on beside the grid, as plain JSON; a store of another one is refused, and
        so is one that another function or other shared arrays began.
      chunk: runs that a device computes at a time, from as many blocks in a row as share a program; kept in the store,
        and the store's when not given. On other devices any other goes on with a store, on the same ones only a smaller
        one (for want of memory).
      default_chunk: that of a new store where `chunk` is not given; measured where neither is.
      devices: how many of this process's devices to use; by default all.
      overwrite: replace a store of another sweep, or begin this one anew.
      compile_cache: folder of the persistent compile cache; True for the usual one, False for none.
      quick_compile: as for `compile_runs`.
      progress: show runs done, runs a second and time left on stderr.

    More seeds of a sweep go into another store; `store.join` makes one data set of both.

    Raises:
      ValueError: on a chunk or a number of devices out of range, a larger chunk than the store's, a store in a bucket.
      DeviceMemoryError: when the devices' memory does not hold a chunk.
      FileExistsError: when something else is at `store`.
      OSError: when the store cannot be written, or another sweep is writing it; what was finished stays readable.
    """
    begin = time.perf_counter()
    # An error before this meeting would leave the other processes waiting for this one.
    with hosts.together("begin the sweep"):
        checks.folder("--out", store)
        chosen = _choose_devices(devices)
        for given in (chunk, default_chunk):
            if given is not None:
                checks.whole("--chunk", given, least=1)
        cache = use_compile_cache(compile_cache)
        sweep = _Sweep(function, grid, shared, settings, finish, chosen, quick_compile)
        template = Template(grid, sweep.variables(), labels or {}, coordinates or {}, sweep.digest(), shared)
    wanted = _Chunk(chunk, default_chunk)
    with ExitStack() as claims:
        opened, chunk = _open(sweep, template, Path(store), dict(configuration or {}), wanted, overwrite, claims)
        _tell_of_what_is_idle(sweep, wanted, opened.path.stem)
        with hosts.together("finish the sweep", lambda over: _show_others(opened, over, progress)):
            runs, before, failed = _compute(sweep, opened, sweep.fitting(chunk), cache, progress)
    return Report(
        path=Path(store),
        runs=runs,
        runs_before=before,
        failed=failed,
        chunk=sweep.fitting(chunk),
        devices=len(chosen),
        programs=len(sweep.programs),
        cache_hits=min(cache.hits, len(sweep.programs)),
        compile_seconds=sweep.first_compile_seconds,
        seconds=time.perf_counter() - begin,
        process=jax.process_index(),
        processes=jax.process_count(),
        size=grid.size,
    )


def _choose_devices(count: int | None) -> list[jax.Device]:
    there = jax.local_devices()
    if count is not None:
        checks.whole(f"--devices (this process has {len(there)})", count, least=1, most=len(there))
    return there[:count]


class Piece(NamedTuple):
    """Runs of a block from `begin` up to `end`: a batch is made of such, of one block or of several."""

    block: Block
    begin: int
    end: int

    @property
    def part(self) -> slice:
        """Where the runs are in the block."""
        return slice(self.begin, self.end)

    @property
    def runs(self) -> int:
        """How many."""
        return self.end - self.begin


def _arguments(block: Block) -> tuple:
    return block.axes, block.seeds


class _Sweep:
    """A function over a grid: its programs, each compiled once, and its results by name."""

    def __init__(self, function, grid, shared, settings, finish, devices, quick_compile):
        self.grid, self.devices, self._quick_compile = grid, devices, quick_compile
        self.programs: dict[tuple, Future[Compiled]] = {}
        self._runs: dict[tuple, Callable] = {}
        self._traces: dict[tuple, tuple[str, Any]] = {}
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

    def program_of(self, block: Block) -> tuple:
        """What tells a block's program from others; blocks of equal ones can be computed in one call."""
        return tuple(sorted(self.static_of(block).items()))

    def one_run(self, static: Mapping) -> Callable:
        """The function of one run, from numbers that a program takes; traced once for all programs that map it."""
        key = tuple(sorted(static.items()))
        if key not in self._runs:

            def run(hyperparameters, seed, *shared):
                return self._function(
                    jax.random.key(seed, impl=random.IMPLEMENTATION), hyperparameters, *shared, **static
                )

            self._runs[key] = jax.jit(run)
        return self._runs[key]

    def digest(self) -> str:
        """What the function computes under all its static keywords, as a number; traces it but computes nothing."""
        return trace.digest_of_all(self._traced(block)[0] for block in self.grid.blocks())

    def variables(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shape and type of one run's values, by name; traces the function but computes nothing."""
        block = self.grid.block(0)
        outcome = self._traced(block)[1]
        zeros = jax.tree.map(lambda leaf: np.zeros((block.num_runs, *leaf.shape[1:]), leaf.dtype), outcome)
        return {
            name: jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
            for name, array in self.finish(zeros, block).items()
        }

    def _traced(self, block: Block) -> tuple[str, Any]:
        """Digest of a block's program, and shapes and types of its results, runs leading."""
        key = self.program_of(block)
        if key not in self._traces:
            self._traces[key] = self._trace(block)
        return self._traces[key]

    def _trace(self, block: Block) -> tuple[str, Any]:
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
            lambda leaf: jax.ShapeDtypeStruct((len(self.devices), *leaf.shape[1:]), leaf.dtype), _arguments(block)
        )
        traced, outcome = jax.make_jaxpr(over_mesh, return_shape=True)(arguments, self._shared)
        # What a device does with one run; around it stands how many devices there are.
        return trace.digest(traced.jaxpr.eqns[-1].params["jaxpr"], traced.consts), outcome

    def finish(self, results: Any, block: Block) -> dict[str, np.ndarray]:
        """Results by variable name, runs leading."""
        return {name: np.asarray(array) for name, array in self._finish(results, block).items()}

    @cached_property
    def most_runs(self) -> int:
        """Most runs of this process that can be computed in one call: of blocks in a row that share a program."""
        blocks = map(self.grid.block, hosts.own_share(self.grid.num_blocks))
        in_a_row = itertools.groupby(blocks, key=self.program_of)
        return max((sum(block.num_runs for block in group) for _, group in in_a_row), default=1)

    def fitting(self, chunk: int) -> int:
        """A chunk, but no more than a device has of the runs that share a program: it would only repeat them."""
        return min(chunk, -(-self.most_runs // len(self.devices)))

    def program(self, block: Block, chunk: int) -> Future[Compiled]:
        """The program of a block, begun to be compiled when it is asked for first."""
        static = self.static_of(block)
        key = (chunk, *self.program_of(block))
        if key not in self.programs:
            runs = chunk * len(self.devices)
            shapes = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct((runs, *leaf.shape[1:]), leaf.dtype), _arguments(block)
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

    def start(self, program: Compiled, pieces: Sequence[Piece], runs: int) -> Any:
        """Begin to compute the runs of some pieces, `runs` at most; they are repeated where there are fewer."""
        own = [jax.tree.map(lambda leaf, piece=piece: leaf[piece.part], _arguments(piece.block)) for piece in pieces]
        places = np.arange(runs) % sum(piece.runs for piece in pieces)
        arguments = jax.tree.map(lambda *leaves: np.concatenate(leaves)[places], *own)
        return program.start(arguments, self._shared)

    def close(self) -> None:
        """End the threads; programs not begun are not compiled."""
        self._pool.shutdown(cancel_futures=True)


def named(results: Any) -> dict[str, np.ndarray]:
    """The leaves of a pytree by their paths, joined by dots; a lone array is called `result`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(results)
    return {jax.tree_util.keystr(path, simple=True, separator=".") or "result": leaf for path, leaf in leaves}


class _Chunk(NamedTuple):
    """The chunk that is asked for, and that of a new store where none is."""

    asked: int | None
    default: int | None

    def new(self, sweep) -> int:
        """That of a new store."""
        given = self.asked if self.asked is not None else self.default
        return _measure_chunk(sweep) if given is None else given

    def going_on(self, held: Store, devices: str) -> int:
        """That with which a store is gone on with.

        Raises:
          ValueError: when numbers that are bit-equal so far would be so no more, and nothing speaks for it.
        """
        asked = held.chunk if self.asked is None else self.asked
        if asked > held.chunk and held.devices == devices:
            raise ValueError(
                f"--chunk must be {held.chunk}, with which {held.path} was begun, or smaller, or be left out; got "
                f"{asked} (on the same devices numbers are bit-equal only at one chunk; another --out begins anew)"
            )
        return asked


def _open(sweep, template, path, configuration, wanted: _Chunk, overwrite, claims: ExitStack) -> tuple[Store, int]:
    """Go on with the store that is there, or make one: process 0 makes it while the others wait. It and its chunk.

    Process 0 keeps sweeps of others from the store until `claims` ends: their blocks would be mixed with its own.
    """
    devices = f"{len(sweep.devices)} × {sweep.devices[0].device_kind}"

    def find():
        held = None if overwrite else stores.resume(path, template, configuration)
        if held is not None:
            wanted.going_on(held, devices)
        elif jax.process_index() == 0:
            stores.check_replaceable(path, overwrite)
        return held

    with hosts.together("open the store"):
        held = find()
        if held is not None or jax.process_index() == 0:
            stores.check_writable(path)
        if jax.process_index() == 0:
            if not claims.enter_context(files.claim(path, wait=False)):
                raise OSError(f"another process is writing {path}: {files.claimed(path)}")
            # It may have been made since.
            held = find()
            if held is None:
                attributes = {"chunk": wanted.new(sweep), "devices": devices}
                stores.create(path, template, configuration, **attributes, overwrite=overwrite)
    with hosts.together("open the store"):
        opened = held or _made_by_process_0(path)
        return opened, wanted.going_on(opened, devices)


_SEEN_WITHIN = 60.0
"""How long after its making a store may stay unseen from other hosts (s): a network's file system looks that rarely."""


def _made_by_process_0(path: Path) -> Store:
    until = time.monotonic() + (_SEEN_WITHIN if jax.process_index() > 0 else 0.0)
    while True:
        try:
            return Store(path)
        except OSError:
            if time.monotonic() >= until:
                raise OSError(
                    f"process {jax.process_index()} does not see {path}: --out must be a folder that all hosts share"
                ) from None
        time.sleep(1.0)


def _tell_of_what_is_idle(sweep: _Sweep, wanted: _Chunk, name: str) -> None:
    """Say once where fewer runs than asked for fit a call, and where there are processes without a block."""
    if jax.process_index() > 0:
        return
    if wanted.asked is not None and (fits := sweep.fitting(wanted.asked)) < wanted.asked:
        told = f"no more than {sweep.most_runs} runs in a row share a program, over {len(sweep.devices)} device(s)"
        print(f"{name}: chunk {wanted.asked} cut to {fits}: {told}", file=sys.stderr)
    idle, processes = jax.process_count() - sweep.grid.num_blocks, jax.process_count()
    if idle > 0:
        told = f"{idle} of {processes} processes have no block: there are {sweep.grid.num_blocks}"
        print(f"{name}: {told}", file=sys.stderr)


def _show_others(store: Store, over: Callable[[float], bool], progress: bool) -> None:
    """Show the blocks of all processes, from the ledger, until the others have finished theirs too."""
    if not progress or jax.process_index() > 0 or over(1.0):
        return
    done = store.done()
    with tqdm(desc="waiting for the other processes", total=len(done), unit="block", file=sys.stderr) as bar:
        while True:
            bar.update(int(store.done().sum()) - bar.n)
            if over(_LOOK_EVERY):
                break
        bar.update(int(store.done().sum()) - bar.n)


_LOOK_EVERY = 5.0


@contextmanager
def _memory(chunk: int) -> Iterator[None]:
    """Say what to do where the devices' memory does not suffice; other errors go on as they are."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not device_memory.is_out_of_memory(error):
            raise
        told = f"out of memory with {chunk} run{'s' if chunk > 1 else ''} a device"
        raise device_memory.DeviceMemoryError(f"{told}: give a smaller --chunk" if chunk > 1 else told) from error


_CHUNKS = (2, 8, 32, 128, 512, 2048)


def _measure_chunk(sweep: _Sweep) -> int:
    """Runs a device to compute at a time: wider chunks are tried while they pay and trying is cheap.

    Wide chunks amortise the overhead of small operations until a chunk's arrays leave the cache. Trying one costs a
    compilation. It is tried while that is less than half of what it would save if it gained as much as the last one
    did; the first gain is taken to be a fifth. One that does not fit the devices' memory is the last.
    """
    block, best, fastest, gain = sweep.grid.block(0), 0, np.inf, 0.2
    for chunk in sorted({sweep.fitting(chunk) for chunk in _CHUNKS}):
        begin = time.perf_counter()
        try:
            with _memory(chunk):
                program = sweep.program(block, chunk).result()
                sweep.first_compile_seconds = sweep.first_compile_seconds or program.seconds
                seconds = _seconds_a_run(sweep, program, block, chunk)
        except device_memory.DeviceMemoryError:
            if not best:
                raise
            break
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
        program.fetch(sweep.start(program, [Piece(block, 0, min(runs, block.num_runs))], runs))
        seconds.append(time.perf_counter() - begin)
    return min(seconds) / runs


def _compute(sweep: _Sweep, store: Store, chunk: int, cache: CacheUse, progress: bool) -> tuple[int, int, int]:
    """Compute what is missing of this process's blocks; runs computed, runs that were there, runs failed."""
    done = store.done()
    own = hosts.own_share(sweep.grid.num_blocks)
    missing = [index for index in own if not done[index]]
    total = sum(sweep.grid.block(index).num_runs for index in own)
    before = total - sum(sweep.grid.block(index).num_runs for index in missing)
    writing, failed, computed = deque(), 0, 0
    of_all = f", process 0 of {jax.process_count()} ({total} of {sweep.grid.size} runs)"
    bar = tqdm(
        desc=store.path.stem + (of_all if jax.process_count() > 1 else ""),
        total=total,
        initial=before,
        unit="run",
        smoothing=0.1,
        file=sys.stderr,
        disable=not progress or jax.process_index() > 0,
    )
    try:
        with bar, ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as writer, _memory(chunk):
            for block, results in _results(sweep, missing, chunk, bar, cache):
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


def _batches(sweep: _Sweep, indices: Sequence[int], runs: int) -> Iterator[list[Piece]]:
    """All runs of some blocks in order, `runs` at a time; a batch holds several blocks where they share a program."""
    for _, group in itertools.groupby(map(sweep.grid.block, indices), key=sweep.program_of):
        pieces, room = [], runs
        for block in group:
            begin = 0
            while begin < block.num_runs:
                pieces.append(Piece(block, begin, min(begin + room, block.num_runs)))
                begin, room = pieces[-1].end, room - pieces[-1].runs
                if not room:
                    yield pieces
                    pieces, room = [], runs
        if pieces:
            yield pieces


def _results(sweep, indices, chunk, bar, cache) -> Iterator[tuple[Block, Any]]:
    """Results of every block, on the host, in order. The devices are one batch ahead of what is fetched."""
    runs = chunk * len(sweep.devices)
    # Programs are asked for in the order of their first block: later ones compile while earlier blocks run.
    for index in indices:
        sweep.program(sweep.grid.block(index), chunk)
    ahead: deque = deque()
    parts: list = []

    def collect():
        pieces, program, started = ahead.popleft()
        fetched, first = program.fetch(started), 0
        for piece in pieces:
            own = slice(first, first + piece.runs)
            parts.append(jax.tree.map(lambda leaf, own=own: leaf[own], fetched))
            first = own.stop
            bar.update(piece.runs)
            if piece.end == piece.block.num_runs:
                # A copy: what waits to be written keeps no whole batch.
                whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
                parts.clear()
                yield piece.block, whole

    for pieces in _batches(sweep, indices, runs):
        program = _ready(sweep, pieces[0].block, chunk, bar, cache)
        ahead.append((pieces, program, sweep.start(program, pieces, runs)))
        if len(ahead) > 1:
            yield from collect()
    while ahead:
        yield from collect()


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
