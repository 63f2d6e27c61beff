"""The benchmark of SmolLM2: who runs what, what it makes of timings and memory, its figure, and its refusals."""

import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"jaxkd": [2.0, 1.0, 9.0], "torch": [3.0, 8.0, 4.0], "torch medium": [5.0, 5.0, 6.0]}
"""What each repetition takes; the medians are 2, 4 and 5."""
PRODUCTS = {"product jaxkd": [0.3, 0.1, 0.2], "product torch": [0.5, 0.5, 0.1]}


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(ROOT / "experiments")
    return importlib.import_module("benchmark_smollm2")


@pytest.mark.parametrize(("num_layers", "kept"), [(30, 12), (24, 8), (2, 2)])
def test_torch_is_given_the_layers_that_jaxkds_students_keep(benchmark, num_layers, kept):
    from jaxkd.smollm2.students import spaced_layers

    assert benchmark.spaced(num_layers, kept) == spaced_layers(num_layers, kept)


def test_flops_of_tasks_are_those_of_their_passes(benchmark):
    """A gradient is three forward passes, DPO has its reference's besides, and a student of 12 layers its teacher's."""
    from jaxkd.smollm2.config import Config

    config = Config.tiny()
    forward, gradient, dpo, decode, distillation = (
        benchmark.flops_of(benchmark.Task(what, "float32", 8, 16, new), config)
        for what, new in (("forward", 0), ("gradient", 0), ("dpo", 0), ("decode", 16), ("distillation", 0))
    )
    student = benchmark.flops_of(benchmark.Task("forward", "float32", 8, 16), benchmark.replace(config, num_layers=12))
    assert gradient == 3 * forward and dpo == 4 * forward and distillation == forward + 3 * student
    # Of 31 tokens read, 16 are projected.
    layers = 2 * (2 * 24 * 8 * (4 + 2) + 3 * 24 * 40) * 3 + 4 * 3 * 4 * 8 * 16
    assert decode == 8 * (31 * layers + 16 * 2 * 264 * 24)


@pytest.fixture
def peers(monkeypatch, benchmark):
    """Two sides that take the seconds above, and what they were asked for."""
    asked, left = [], {label: list(values) for label, values in (SECONDS | PRODUCTS).items()}

    class FakePeer:
        def __init__(self, name, folder=None):
            self.name = name

        def ask(self, verb, task):
            label = f"{self.name} medium" if task.precision == "medium" else self.name
            label = f"product {label}" if task.what == "product" else label
            asked.append((verb, label))
            return 0.5 if verb == "prepare" else left[label].pop(0)

        def stop(self):
            asked.append(("stop", self.name))

    monkeypatch.setattr(benchmark, "Peer", FakePeer)
    return {name: FakePeer(name) for name in ("jaxkd", "torch")}, asked


def test_sides_take_turns_and_ratios_are_of_medians(benchmark, peers):
    sides, asked = peers
    task = benchmark.Task("decode", "float32", batch=8, length=4, new_tokens=10)
    flops = benchmark.PRODUCT**3
    row = benchmark.time_task(task, flops, sides, benchmark.Benchmark(repetitions=3, torch_decode_batches=(8,)))
    labels = [*SECONDS, *PRODUCTS]
    assert asked == [("prepare", label) for label in labels] + 3 * [("run", label) for label in labels]
    assert row["seconds"] == {"jaxkd": 2.0, "torch": 4.0, "torch medium": 5.0}
    assert row["seconds_smallest"] == {"jaxkd": 1.0, "torch": 3.0, "torch medium": 5.0}
    assert row["times_faster_than"] == {"torch": 2.0, "torch medium": 2.5}
    assert row["tokens_a_second"] == {"jaxkd": 40.0, "torch": 20.0, "torch medium": 16.0}
    # A product of twice the task's FLOPs takes 0.2 s where it is faster.
    assert row["share_of_product"] == pytest.approx(0.05)
    assert row["compile_s"] == 0.5 and row["name"] == "decode float32 8x10"


@pytest.mark.parametrize(
    ("what", "dtype", "trl", "labels"),
    [
        ("forward", "float32", True, ["jaxkd", "torch", "torch medium"]),
        # The precision is that of float32 products.
        ("gradient", "bfloat16", True, ["jaxkd", "torch"]),
        ("decode", "float32", True, ["jaxkd"]),
        ("dpo", "float32", True, ["jaxkd", "torch", "torch medium"]),
        ("dpo", "float32", False, ["jaxkd"]),
        ("gradient", "float32", False, ["jaxkd", "torch", "torch medium"]),
    ],
)
def test_who_runs_a_task(monkeypatch, benchmark, peers, what, dtype, trl, labels):
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: trl or name != "trl")
    task, asked = benchmark.Task(what, dtype, 128, 8), benchmark.Benchmark(torch_decode_batches=(1, 8))
    found = benchmark.contestants_of(task, peers[0], asked)
    assert [(label, peer.name, one.precision) for label, peer, one in found] == [
        (label, label.split()[0], "medium" if "medium" in label else "default") for label in labels
    ]


def test_memory_is_put_into_the_row_of_its_task_on_the_sides_that_were_timed(monkeypatch, benchmark):
    monkeypatch.setattr(benchmark, "memory_of", lambda name, folder, task: {"peak": len(name), "task": task.name})
    timed, alone, long = (benchmark.Task(what, "float32", 8, 64) for what in ("forward", "decode", "gradient"))
    rows = [
        {"name": timed.name, "seconds": {"torch": 1, "torch medium": 1, "jaxkd": 1}},
        {"name": alone.name, "seconds": {"jaxkd": 1}},
    ]
    layers = benchmark.replace(long, remat="layers")
    for task in (timed, alone, long, layers):
        benchmark.add_memory(rows, task, ["jaxkd", "torch"], "folder")
    assert [row["name"] for row in rows] == [timed.name, alone.name, long.name, f"{long.name} remat layers"]
    assert [list(row["memory_bytes"]) for row in rows] == [["jaxkd", "torch"], ["jaxkd"], ["jaxkd"], ["jaxkd"]]
    assert all(one["task"] == row["name"] for row in rows for one in row["memory_bytes"].values())


def test_memory_of_long_texts_is_measured_streamed_and_whole_with_both_remats(benchmark):
    tasks = benchmark.memory_tasks_of(benchmark.Benchmark())
    assert {(task.what, task.remat, task.batch, task.length) for task in tasks} == {
        (what, remat, 4, 1024) for what in ("gradient", "naive_gradient") for remat in ("products", "layers")
    }
    assert len({task.name for task in tasks}) == 4
    assert benchmark.memory_tasks_of(benchmark.Benchmark(only=("decode",))) == []
    assert benchmark.memory_tasks_of(benchmark.Benchmark(memory=False)) == []


@pytest.mark.parametrize(("remat", "kept"), [("products", False), ("layers", True)])
def test_a_task_s_remat_is_the_model_s(benchmark, remat, kept):
    from jaxkd.smollm2.config import Config

    side = benchmark.JaxSide.__new__(benchmark.JaxSide)
    side.config = Config.tiny()
    assert (side._model(benchmark.Task("gradient", "float32", 1, 2, remat=remat)).remat == "layers") == kept


def test_torch_takes_a_thread_for_every_core_that_this_process_may_use(monkeypatch, benchmark):
    threads, model = [], SimpleNamespace(from_pretrained=lambda folder, dtype: SimpleNamespace())
    transformers = SimpleNamespace(AutoModelForCausalLM=model, GenerationConfig=dict)
    for name, fake in (
        ("torch", SimpleNamespace(set_num_threads=threads.append, float32=None)), ("transformers", transformers)
    ):  # fmt: skip
        monkeypatch.setitem(sys.modules, name, fake)
    for variable in ("HF_HUB_OFFLINE", "TQDM_DISABLE"):
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 3, 7})
    benchmark.TorchSide("folder")
    assert threads == [3]


@pytest.mark.parametrize("tells", [True, False])
def test_without_a_memory_to_read_times_are_measured_and_drawn_all_the_same(
    monkeypatch, capsys, tmp_path, benchmark, peers, tells
):
    monkeypatch.setattr(benchmark, "convert", lambda source, folder: {"from_source": 1.0})
    monkeypatch.setattr(benchmark, "memory_of", lambda name, folder, task: {"before": 1, "peak": 2**30})
    monkeypatch.setattr(benchmark, "tells_memory", lambda: tells)
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda name: name)
    path = tmp_path / "runs/a.json"
    wanted = benchmark.Benchmark(
        source="random:tiny", only=("forward",), length=9, long_length=9, repetitions=1, json_file=path
    )
    monkeypatch.setattr(benchmark, "tasks_of", lambda _: [benchmark.Task("forward", "float32", 8, 9)])
    benchmark.main(wanted)
    out, err = capsys.readouterr()
    result = json.loads(path.read_text())
    assert json.loads(out) == result
    assert ("Memory is not measured: this system has no" in err) != tells
    assert [sorted(row.get("memory_bytes", ())) for row in result["tasks"]] == [["jaxkd", "torch"] if tells else []]
    assert result["cpus"] == len(os.sched_getaffinity(0))
    assert peers[1][-2:] == [("stop", "jaxkd"), ("stop", "torch")]
    # Beside the numbers, whatever else is in figures/.
    assert {file.name for file in path.parent.iterdir()} == {"a.json", "a.png"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 129}, "--length must be at most 128, the positions of random:tiny; got 129"),
        ({"long_length": 200}, "--long-length must be at most 128, the positions of random:tiny; got 200"),
        ({"prompt_length": 100}, "--prompt-length and --new-tokens together must be at most 128, .* got 164"),
    ],
)
def test_texts_longer_than_the_model_takes_are_refused_before_anything_is_measured(
    monkeypatch, benchmark, changes, message
):
    monkeypatch.setattr(benchmark, "convert", lambda *_: pytest.fail("too late"))
    wanted = benchmark.Benchmark(**({"source": "random:tiny", "long_length": 100} | changes))
    with pytest.raises(ValueError, match=message):
        benchmark.measure(wanted)


# --- processes -------------------------------------------------------------------------------------------------------


def fails(connection, how):
    """Run in a process of its own."""
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "exits":
        os._exit(3)
    raise {"value": ValueError("no such thing"), "memory": MemoryError("full"), "key": KeyError("nothing")}[how]


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("value", ValueError, "(?m)^torch, a task: no such thing$"),
        ("memory", MemoryError, "(?m)^torch, a task: full$"),
        ("key", RuntimeError, "(?m)^torch, a task: KeyError: 'nothing'$"),
        ("killed", OSError, "^the process of torch, a task was killed, as systems do that run out of memory$"),
        ("exits", OSError, "^the process of torch, a task ended with exit code 3$"),
    ],
)
def test_what_goes_wrong_in_a_process_is_raised_where_it_is_waited_for(benchmark, how, kind, message):
    with pytest.raises(kind, match=message) as caught:
        benchmark.Child("torch, a task", fails, how).receive()
    if kind is not OSError:
        assert "in fails" in caught.value.__notes__[0]


# --- figure ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def figure(monkeypatch, tmp_path, benchmark):
    """The figure drawn from the committed numbers, and those."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    result = json.loads((ROOT / "figures/smollm2_benchmark.json").read_text())
    path = tmp_path / "a.png"
    benchmark.draw(result, path)
    monkeypatch.undo()
    assert path.stat().st_size > 10_000
    yield figures[0], result["tasks"]
    plt.close(figures[0])


def test_the_figure_shows_every_time_and_rate_of_the_committed_numbers(figure, benchmark):
    figure, rows = figure
    passes, decoding, _ = figure.axes
    timed = [row for row in rows if "seconds" in row]
    least = [row["model_flops"] / row["product_flops_a_second"] for row in timed if row["what"] != "decode"]
    most = [
        row["batch"] * row["new_tokens"] * row["product_flops_a_second"] / row["model_flops"]
        for row in timed
        if row["what"] == "decode"
    ]
    for axes, quantity, along in ((passes, "seconds", "get_xdata"), (decoding, "tokens_a_second", "get_ydata")):
        told = [row[quantity] for row in timed if (row["what"] == "decode") == (axes is decoding)]
        assert len(told) >= 4
        for line in axes.get_lines():
            side = line.get_label()
            drawn = sorted(getattr(line, along)())
            if side == "product":
                assert drawn == pytest.approx(sorted(least if axes is passes else most))
            else:
                assert drawn == sorted(values[side] for values in told if side in values)
    # A logarithmic axis has no zero for a bar to begin at.
    assert not passes.patches and passes.get_xscale() == "log"
    labels = [label.get_text() for label in passes.get_yticklabels()]
    assert (
        len(labels) == len(timed) - len(decoding.get_xticks()) and labels[-1] == "step of distillation\nfloat32, 4 × 64"
    )


def test_bars_of_memory_begin_at_zero_and_what_was_not_measured_is_said(figure):
    figure, rows = figure
    memory = figure.axes[2]
    weighed = [row["memory_bytes"] for row in rows if "memory_bytes" in row and row["what"] != "decode"]
    gib = sorted(peaks["peak"] / 2**30 for sides in weighed for peaks in sides.values())
    assert memory.get_ylim()[0] == 0 and sorted(bar.get_height() for bar in memory.patches) == pytest.approx(gib)
    missing = [text for text in memory.texts if text.get_text() == "not measured"]
    assert len(missing) == sum(2 - len(sides) for sides in weighed) > 0
    # Bars and words stand on both sides of their label.
    centres = [bar.get_x() + bar.get_width() / 2 for bar in memory.patches] + [text.xy[0] for text in missing]
    assert sorted(round(centre - round(centre), 6) for centre in centres) == [-0.2] * len(weighed) + [0.2] * len(
        weighed
    )
