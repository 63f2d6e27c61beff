"""How fast is a sweep? Runs a second against chunk size and device count, beside a jitted loop and eager PyTorch.

One run of the reference workload is three EM fits (8 components, 2048 points, 60 iterations), two policy-gradient
alignments (400 updates of 256 fresh draws) and the metrics of five models on a 121 × 121 grid. It is timed

- through jaxkd's engine, for every chunk (runs that a device computes at a time) on every number of devices;
- as a jitted function called for one run after another, on one device;
- as an eager PyTorch loop, one thread a process and as many processes as cores, where torch is installed.

Then the cost is measured against runs, steps, samples and components, each over a factor of 8. Repetitions of all forms
take turns, so that what else the machine does meets all of them; medians are printed. Ends with a table, the ratios,
benchmark_sweep.json, throughput.png and throughput.pdf.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import tyro
from reference_workload import (
    COVARIANCE_FLOOR,
    KL_COEF,
    LEARNING_RATE,
    TEMPERATURE,
    Workload,
    make_problem,
    run_of,
)

from jaxkd.sweep import engine

MS_A_RUN_LIMIT = 6.0
TORCH_RATIO_LIMIT, TORCH_RATIO_AIM = 40.0, 60.0
FACTORS = (1, 2, 4, 8)
DEFAULTS = {"runs": 64, "chunks": (1, 4, 16, 32), "loop_runs": 8, "torch_runs": 2, "repetitions": 5}
QUICK = {"runs": 16, "chunks": (8,), "loop_runs": 4, "torch_runs": 1, "repetitions": 2}


@dataclass(frozen=True)
class Benchmark:
    """What to time."""

    runs: int | None = None
    """Runs in a call of the engine, 64 by default; for the widest chunks as many more as all devices take at a time."""
    chunks: tuple[int, ...] | None = None
    """Runs that a device computes at a time; 1, 4, 16 and 32 by default."""
    devices: tuple[int, ...] | None = None
    """Numbers of devices; by default one and all. On a CPU each core is a device."""
    loop_runs: int | None = None
    """Runs of the jitted loop in a repetition, 8 by default."""
    torch_runs: int | None = None
    """Runs of each PyTorch process in a repetition, 2 by default; 0 leaves PyTorch out."""
    repetitions: int | None = None
    """Repetitions of every timing, 5 by default."""
    growth: bool = True
    """Whether to measure how the cost grows."""
    workload: Workload = field(default_factory=Workload)
    """Sizes of a run, by default the reference workload; each at least 8 when growth is measured over it."""
    out: Path = Path("runs/benchmark_sweep")
    """Folder for the JSON and the figure; files of an earlier benchmark are replaced."""
    quick: bool = False
    """A run of about a minute: 2 repetitions of fewer runs and one chunk, unless others are given, growth over the runs
    alone and from its two ends. Its ratios are rough."""

    def __post_init__(self):
        from jaxkd import checks

        for name, least in (("runs", 1), ("loop_runs", 1), ("torch_runs", 0), ("repetitions", 1)):
            if getattr(self, name) is not None:
                checks.whole(f"--{name.replace('_', '-')}", getattr(self, name), least=least)
        for flag, values in (("--chunks", self.chunks), ("--devices", self.devices)):
            if values is not None:
                checks.numbers(flag, values, least=1)
        if self.growth:
            for name in ("steps", "iterations", "samples", "points", "components"):
                least = 32 if name in ("samples", "points") else 8
                checks.whole(f"--workload.{name} (--no-growth allows less)", getattr(self.workload, name), least=least)

    def resolved(self) -> "Benchmark":
        """The benchmark with its defaults, or those of --quick, in the place of flags that were not given."""
        defaults = QUICK if self.quick else DEFAULTS
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


def growth_workloads(workload: Workload, factors=FACTORS) -> dict[str, list[tuple[int, Workload]]]:
    """Workloads by axis, each with its size; the largest of every axis is the given one.

    Steps are updates and EM iterations together, samples are draws and EM points together.
    """

    def scaled(factor, *names):
        # An even number of draws, since the workload asks for it.
        changed = {name: round(getattr(workload, name) * factor / factors[-1]) for name in names}
        return replace(workload, **{name: n + n % 2 if name == "samples" else n for name, n in changed.items()})

    axes = {"steps": ("steps", "iterations"), "samples": ("samples", "points"), "components": ("components",)}
    workloads = {axis: [scaled(factor, *names) for factor in factors] for axis, names in axes.items()}
    return {axis: [(getattr(each, axis), each) for each in several] for axis, several in workloads.items()}


# --- the forms -------------------------------------------------------------------------------------------------------


@dataclass
class Form:
    """Something to be timed: a call that makes `runs` runs, what its row says, and its seconds so far."""

    call: Callable[[], object]
    runs: int
    row: dict
    seconds: list[float] = field(default_factory=list)

    def repeat(self) -> None:
        """Make one repetition."""
        begin = time.perf_counter()
        self.call()
        self.seconds.append(time.perf_counter() - begin)

    def result(self) -> dict:
        """The row with its timings."""
        return {**self.row, "runs": self.runs, "seconds": self.seconds}


def keys_of(runs: int):
    """One key a run."""
    import jax
    import jax.numpy as jnp

    from jaxkd import random

    return jax.vmap(lambda seed: jax.random.key(seed, impl=random.IMPLEMENTATION))(jnp.arange(runs))


def engine_form(workload: Workload, runs: int, chunk: int, devices: int) -> Form:
    """A workload through jaxkd's engine, compiled and warmed up."""
    import jax

    keys, shared = keys_of(runs), make_problem(workload)
    compiled = engine.compile_runs(
        run_of(workload),
        (keys,),
        shared,
        batch_size=chunk,
        devices=jax.local_devices()[:devices],
    )
    return Form(lambda: compiled.call((keys,), shared), runs,
                {"devices": devices, "chunk": chunk, "compile_s": compiled.seconds})  # fmt: skip


def loop_form(workload: Workload, runs: int) -> Form:
    """A workload as a jitted function of one run, called for one run after another on one device."""
    import jax

    keys, shared = keys_of(runs), make_problem(workload)
    begin = time.perf_counter()
    single = jax.jit(run_of(workload)).lower(keys[0], *shared).compile()
    seconds = time.perf_counter() - begin

    def one_after_another():
        for key in keys:
            jax.block_until_ready(single(key, *shared))

    return Form(one_after_another, runs, {"compile_s": seconds})


def torch_sizes(workload: Workload) -> dict:
    """All that `eager_torch` must know of a run."""
    return asdict(workload) | {
        "learning_rate": LEARNING_RATE,
        "kl_coef": KL_COEF,
        "temperature": TEMPERATURE,
        "covariance_floor": COVARIANCE_FLOOR,
    }


@contextmanager
def torch_form(workload: Workload, runs: int, processes: int):
    """A workload in PyTorch processes of one thread, warmed up and waiting; None where torch is not installed."""
    if runs == 0 or importlib.util.find_spec("torch") is None:
        yield None
        return
    import eager_torch

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        path = Path(folder) / "problem.npz"
        eager_torch.save(path, *make_problem(workload), torch_sizes(workload))
        command = [sys.executable, eager_torch.__file__, str(path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        workers = [
            stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            )
            for _ in range(processes)
        ]

        def wait_for(word):
            for worker in workers:
                if (told := worker.stdout.readline().strip()) != word:
                    raise RuntimeError(f"a PyTorch process said {told!r} instead of {word!r}; its error is above")

        def all_at_once():
            for i, worker in enumerate(workers):
                worker.stdin.write(f"{1 + i * runs} {runs}\n")
                worker.stdin.flush()
            wait_for("done")

        wait_for("ready")
        yield Form(all_at_once, runs * processes, {"processes": processes, "version": torch_version()})


def torch_version() -> str:
    """Of the torch that is installed."""
    from importlib.metadata import version

    return version("torch")


# --- measuring -------------------------------------------------------------------------------------------------------


def repeat_in_turn(forms: list[Form], repetitions: int, tell: Callable[[str], None]) -> None:
    """Time all forms, one repetition of each after another; one more before, which is not counted."""
    for form in forms:
        form.call()
    for i in range(repetitions):
        for form in forms:
            tell(f"repetition {i + 1} of {repetitions}")
            form.repeat()


def device_counts(benchmark: Benchmark) -> tuple[int, ...]:
    """The numbers of devices to use.

    Raises:
      ValueError: when there are not so many.
    """
    import jax

    from jaxkd import checks

    there = jax.local_device_count()
    counts = benchmark.devices or tuple(sorted({1, there}))
    checks.numbers(f"--devices (this process has {there})", counts, least=1, most=there)
    return counts


def measure_forms(benchmark: Benchmark, counts: tuple[int, ...], tell) -> dict:
    """Rows of the engine, of the loop and of PyTorch."""
    forms = []
    for count in counts:
        for chunk in benchmark.chunks:
            tell(f"compiling: {chunk} a chunk on {count} of the devices")
            runs = max(benchmark.runs, chunk * count)
            forms.append(engine_form(benchmark.workload, runs, chunk, count))
    tell("compiling: one run")
    loop = loop_form(benchmark.workload, benchmark.loop_runs)
    tell("starting PyTorch")
    with torch_form(benchmark.workload, benchmark.torch_runs, engine.cpu_cores()) as torch:
        repeat_in_turn([*forms, loop, *([torch] if torch else [])], benchmark.repetitions, tell)
    return {
        "engine": [form.result() for form in forms],
        "loop": loop.result(),
        "torch": torch.result() if torch else None,
    }


def measure_growth(benchmark: Benchmark, chunk: int, devices: int, tell) -> dict:
    """Rows by axis: the time of a whole call on one chunk a device, and of more and more chunks."""
    factors = (FACTORS[0], FACTORS[-1]) if benchmark.quick else FACTORS
    runs = chunk * devices
    wanted = {("runs", runs * factor): (benchmark.workload, runs * factor) for factor in factors}
    # Each size of the other axes is a program of its own: too much to compile for a quick look.
    others = {} if benchmark.quick else growth_workloads(benchmark.workload, factors)
    for axis, workloads in others.items():
        wanted |= {(axis, size): (workload, runs) for size, workload in workloads}

    def make(workload_and_runs):
        form = engine_form(*workload_and_runs, chunk, devices)
        tell("compiling: growth")
        return form

    # The largest of every axis is one and the same program; all are compiled side by side.
    different = list(dict.fromkeys(wanted.values()))
    with ThreadPoolExecutor(max_workers=engine.cpu_cores()) as pool:
        forms = dict(zip(different, pool.map(make, different), strict=True))
    repeat_in_turn(list(forms.values()), benchmark.repetitions, tell)
    growth = {}
    for (axis, size), which in wanted.items():
        growth.setdefault(axis, []).append({"size": size} | forms[which].result())
    return growth


def count_steps(benchmark: Benchmark, counts: tuple[int, ...]) -> int:
    """How often progress is told: once a form that is made, and once a repetition of it."""
    forms = len(counts) * len(benchmark.chunks) + 2
    timed = forms - 1 if benchmark.torch_runs == 0 or importlib.util.find_spec("torch") is None else forms
    # The largest size of the three other axes is the smallest number of runs.
    growth = 0 if not benchmark.growth else 2 if benchmark.quick else len(FACTORS) + 3 * (len(FACTORS) - 1)
    return forms + growth + benchmark.repetitions * (timed + growth)


def measure(benchmark: Benchmark) -> dict:
    """Everything, as plain JSON."""
    from tqdm import tqdm

    from jaxkd import throughput
    from jaxkd.sweep import store

    counts = device_counts(benchmark)
    # Where the files go is no part of what was measured.
    configuration = {name: value for name, value in asdict(benchmark).items() if name != "out"}
    results = {"provenance": store.provenance(configuration), "cores": engine.cpu_cores(), "growth": {}}
    with tqdm(desc="benchmark_sweep", total=count_steps(benchmark, counts), unit="step", file=sys.stderr) as bar:

        def tell(what):
            bar.set_postfix_str(what, refresh=False)
            bar.update()

        results |= measure_forms(benchmark, counts, tell)
        if benchmark.growth:
            fastest = throughput.best(results)
            results["growth"] = measure_growth(benchmark, fastest["chunk"], fastest["devices"], tell)
    return results | {"ratios": throughput.ratios(results)}


def summarise(results: dict, benchmark: Benchmark) -> str:
    """The ratios in words."""
    from jaxkd import throughput

    fastest, ratios = throughput.best(results), results["ratios"]
    milliseconds = throughput.milliseconds_a_run(fastest)
    is_reference = benchmark.workload == Workload()

    def held_to(limit):
        return f" ({limit})" if is_reference and not benchmark.quick else ""

    lines = [
        f"Best: {milliseconds:.2f} ms a run on {fastest['devices']} of the devices, {fastest['chunk']} a chunk"
        + held_to(f"on two cores at most {MS_A_RUN_LIMIT:g} is wanted"),
        f"{ratios['loop']:.1f} times the runs a second of the jitted loop",
    ]
    if "torch" in ratios:
        wanted = f"at least {TORCH_RATIO_LIMIT:g} is wanted, {TORCH_RATIO_AIM:g} is the aim"
        lines.append(
            f"{ratios['torch']:.1f} times the runs a second of {results['torch']['processes']} PyTorch "
            f"{results['torch']['version']} processes{held_to(wanted)}"
        )
    elif benchmark.torch_runs == 0:
        lines.append("PyTorch was left out: --torch-runs is 0.")
    else:
        lines.append("PyTorch is not installed, so nothing is compared with it: pip install -e '.[parity]'")
    return "\n".join(lines)


def main(benchmark: Benchmark) -> None:
    """Measure, print and write."""
    from jaxkd import throughput
    from jaxkd.sweep import store

    begin = time.perf_counter()
    benchmark = benchmark.resolved()
    device_counts(benchmark)
    store.check_writable(benchmark.out / "benchmark_sweep.json")
    results = measure(benchmark)
    print(throughput.table(results))
    print("\n" + summarise(results, benchmark))
    (benchmark.out / "benchmark_sweep.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    throughput.draw(results, benchmark.out / "throughput.png", benchmark.out / "throughput.pdf")
    print(f"\nWrote benchmark_sweep.json, throughput.png and throughput.pdf to {benchmark.out}")
    print(f"in {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        engine.use_cpu_cores_as_devices()
        main(tyro.cli(Benchmark, description=__doc__))
