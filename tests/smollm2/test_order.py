"""The order on a language model: its stages, their durability, and what is refused."""

import ast
import csv
import json
import math
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import xarray as xr
from matplotlib import pyplot as plt
from scipy import stats

from jaxkd import align, durable, pipelines
from jaxkd.cli import Training
from jaxkd.smollm2 import (
    behaviours,
    draws,
    dry_run,
    evaluate,
    generate,
    laboratory,
    network,
    order_figure,
    passes,
    report,
    stages,
    tokenization,
    twins,
    weights,
)
from jaxkd.smollm2 import order as orders
from jaxkd.smollm2.adapters import LoRA
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.cost import Cost, forward_flops, log_prob_flops
from jaxkd.smollm2.laboratory import BEHAVIOUR, EVALUATION, Laboratory
from jaxkd.smollm2.metering import Workshop
from jaxkd.smollm2.order import CEILING, Order
from jaxkd.smollm2.policy import Texts
from jaxkd.smollm2.preferences import Preferences
from jaxkd.smollm2.rows import Row, deciding_student, rows_of
from jaxkd.sweep import cache
from tests.smollm2 import by_hand, tiny_order

# Orbax, optax and the host loop are not ours to be strict about.
pytestmark = pytest.mark.loose
DRAWN_BY = order_figure
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with every kind of stage."""
    out = tmp_path_factory.mktemp("run")
    order = tiny_order.make(arms=("kd_align", "kd_align_sharpened", "align_kd", CEILING), look_every=3)
    return order, out, tiny_order.run(order, out)


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """An offline algorithm, and a cut student that may stand far from the base."""
    out = tmp_path_factory.mktemp("offline")
    order = tiny_order.make(
        arms=("kd_align", "kd_align_anchored"),
        algorithms=("offline_dpo_ref",),
        students=("same", "layers:2"),
        most_held_out_kl=10.0,
    )
    return order, out, tiny_order.run(order, out)


@pytest.mark.slow
def test_every_row_is_made_once(finished):
    order, out, laboratory = finished
    rows = rows_of(order, out)
    assert len({row.folder for row in rows}) == len(rows)
    for row in rows:
        assert durable.read_record(row.folder)["name"] == row.name
        assert not (row.folder / durable.CHECKPOINT).exists()
    # Neither a student nor the aligned base depends on all axes.
    many = rows_of(replace(order, students=("same", "layers:2"), algorithms=("reinforce", "kto")), out)
    assert sum(row.name == "student" for row in many) == 2
    assert sum(row.name == "aligned_base" for row in many) == 2
    assert not list(laboratory.run(rows))
    before = {path: path.stat().st_mtime_ns for path in _files(out)}
    tiny_order.run(order, out)
    assert {path: path.stat().st_mtime_ns for path in _files(out)} == before


@pytest.mark.slow
def test_what_was_measured_is_what_it_says(finished):
    order, out, laboratory = finished
    base = json.loads((out / "base" / "evaluation.json").read_text())
    assert base["recall_gap"] == 0 and base["kl_to_base"] == 0 and base["bounded_recall"] == 1
    row = next(row for row in rows_of(order, out) if row.name == "kd_align")
    found = json.loads((row.folder / "evaluation.json").read_text())
    with np.load(row.folder / "samples.npz") as file:
        texts = laboratory.setting.texts_of(Texts(**file))
    shown = np.mean([any(sign.isdigit() and sign.isascii() for sign in text) for text in texts])
    assert found["behaviour_frequency"] == pytest.approx(shown)
    assert found["behaviour_frequency_wilson_low"] <= shown <= found["behaviour_frequency_wilson_high"]
    assert found["objective"] == pytest.approx(found["reward"] - row.kl_coef * found["kl_to_reference"])
    assert found["recall_gap"] == pytest.approx(base["recall"] - found["recall"], abs=1e-5)


def _texts(path: Path, n: int) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {name: file[name][:n] for name in file}


def _measured_by_hand(order: Order, out: Path, row: Row, base, reference) -> dict[str, float]:
    """An arm's quantities from its samples and the checkpoints on disk."""

    def of(source, x) -> np.ndarray:
        return by_hand.log_prob(*weights.load(source), x)

    x = _texts(row.folder / "samples.npz", order.evaluation.num_scored)
    own, by_truth, by_base, by_reference = (
        of(source, x) for source in (row.folder / "model", "random:tiny", base, reference)
    )
    of_truth = _texts(out / "truth" / "samples.npz", order.evaluation.num_truth_samples)
    found, best = of(row.folder / "model", of_truth), of("random:tiny", of_truth)
    lost = best - found
    n = len(lost)
    return {
        "precision": by_truth.mean(),
        "precision_per_token": by_truth.sum() / x["completion_mask"].sum(),
        "entropy_per_token": -own.sum() / x["completion_mask"].sum(),
        "kl_to_base": np.mean(own - by_base),
        "kl_to_base_error": np.std(own - by_base, ddof=1) / len(own) ** 0.5,
        "kl_to_reference": np.mean(own - by_reference),
        "recall": found.mean(),
        "recall_gap": lost.mean(),
        "recall_gap_error": (np.sum((lost - lost.mean()) ** 2) / (n * (n - 1))) ** 0.5,
        "held_out_perplexity": np.exp(-found.sum() / of_truth["completion_mask"].sum()),
        "bounded_recall": np.mean([one > other - np.log(10) for one, other in zip(found, best, strict=True)]),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kd_align", "align_kd"])
def test_what_was_measured_by_hand(finished, name):
    """Of an arm that is held to the student, and of one that is held to the base, which is the truth."""
    order, out, _ = finished
    row = next(row for row in rows_of(order, out) if row.name == name)
    reference = row.folder.parents[1] / "student-t0.6" / "model" if name == "kd_align" else "random:tiny"
    expected = _measured_by_hand(order, out, row, "random:tiny", reference)
    found = json.loads((row.folder / "evaluation.json").read_text())
    assert {quantity: found[quantity] for quantity in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_step_0_of_an_alignment_is_at_its_reference(finished, offline):
    for order, out, _ in (finished, offline):
        for row in rows_of(order, out):
            if isinstance(row.stage, pipelines.Align) and row.stage.start == row.stage.reference:
                first = json.loads((row.folder / durable.METRICS).read_text().splitlines()[0])
                assert first["step"] == 0 and first["kl"] == pytest.approx(0, abs=1e-4)
                if row.algorithm == "offline_dpo_ref":
                    assert first["loss"] == pytest.approx(np.log(2), abs=1e-4)


@pytest.mark.slow
def test_an_alignment_logs_looks_at_its_samples(finished):
    """Of 64 draws each, after every third step."""
    order, out, _ = finished
    aligned = [row for row in rows_of(order, out) if row.is_alignment]
    assert {row.name for row in aligned} == {"aligned_base", "kd_align"}
    for row in aligned:
        logged = durable.entries(row.folder / durable.METRICS)
        assert [entry["step"] for entry in logged if "look_frequency" in entry] == [2, 5]
        for entry in logged[2::3]:
            assert 0 <= entry["look_frequency"] == entry["look_reward"] <= 1
            assert entry["look_frequency"] * stages.LOOK == round(entry["look_frequency"] * stages.LOOK)


@pytest.mark.parametrize("mode", [{}, {"quick": True}, {"preset": "paper"}])
def test_every_preset_looks_along_an_alignment(mode):
    script = runpy.run_path(str(ROOT / "experiments" / "smollm2_order.py"))
    order = script["order_of"](script["Flags"](**mode))
    for algorithm in order.algorithms:
        alignment = orders.alignment_of(order, algorithm)
        assert alignment.settings.num_steps >= alignment.look_every > 0


@pytest.mark.slow
def test_sharpening_divides_the_logits(finished):
    import jax
    import jax.numpy as jnp

    _, _, laboratory = finished
    model, params = laboratory.base.model, laboratory.base.params
    tokens = jnp.asarray([[5, 6, 7]], jnp.int32)
    sharp = laboratory.base.sharpened(0.5).params
    np.testing.assert_allclose(
        jax.jit(model.logits)(sharp, tokens), 2 * jax.jit(model.logits)(params, tokens), rtol=1e-5, atol=1e-5
    )


def test_a_model_is_sharpened_at_the_temperature_of_its_stage(tmp_path, monkeypatch):
    """A number where the stage has one, else the axis."""
    monkeypatch.setitem(pipelines.STAGES, "halved", pipelines.Sharpen("align_kd", temperature=0.5))
    order = tiny_order.make(arms=("halved", "kd_align_sharpened"))
    laboratory = tiny_order.laboratory(order, tmp_path)
    laboratory.model = lambda folder: SimpleNamespace(sharpened=lambda temperature: (folder, temperature))
    rows = {row.name: row for row in rows_of(order, tmp_path)}
    for name, teacher, temperature in (("halved", "align_kd", 0.5), ("kd_align_sharpened", "kd_align", 0.6)):
        assert laboratory._make(rows[name]) == (rows[teacher].folder, temperature)


@pytest.mark.slow
def test_cut_students_are_checkpoints(offline):
    order, out, laboratory = offline
    row = next(row for row in rows_of(order, out) if row.student == "layers:2" and row.name == "kd_align")
    config, _ = weights.load(row.folder / "model")
    assert config.num_layers == 2 and laboratory.base.config.num_layers == 3


@pytest.mark.slow
def test_report(finished, tmp_path):
    order, out, _ = finished
    run = report.read(order, out)
    dataset = report.to_dataset(run)
    assert dict(dataset.sizes) == {
        "algorithm": 1,
        "student": 1,
        "temperature": 1,
        "kl_coef": 1,
        "seed": 1,
        "stage": len(order.arms) + 3,
    }
    frequency = dataset.behaviour_frequency
    assert frequency.notnull().all()
    flops = dataset.model_flops.isel(temperature=0, kl_coef=0, seed=0, algorithm=0, student=0)
    assert flops.sel(stage="kd_align") > flops.sel(stage="student") > 0
    rows = report.table(run)
    assert {row["arm"] for row in rows} == {"base", "student", "aligned_base", *order.arms}
    assert "kd_align" in report.format_table(rows)
    # Where it is a likelihood that was to be raised, every seed's is told, and the students' names are whole.
    many = {"student": "somebody/a-student-of-135M", "seed_points": "0 1", "reward_points": "1.25 1.75"}
    lines = report.format_table([row | many for row in rows], "reward").splitlines()
    assert lines[0].split()[5] == "reward" and all("1.2500" in line and "1.7500" in line for line in lines[2:])
    assert all("somebody/a-student-of-135M  " in line for line in lines[2:])
    arm = next(row for row in rows if row["arm"] == "kd_align")
    student = next(row for row in rows if row["arm"] == "student")
    assert arm["expected_target_hits"] == pytest.approx(6 * 8 * student["behaviour_frequency"])
    folder = next(row.folder for row in rows_of(order, out) if row.name == "kd_align")
    seen = [json.loads(line)["target_hits"] for line in (folder / durable.METRICS).read_text().splitlines()]
    assert arm["target_hits"] == sum(seen) > 0 and seen[int(arm["first_hit_step"])] > 0
    costs = {row["arm"]: row for row in report.stage_costs(run)}
    assert set(costs) == {row["arm"] for row in rows}
    assert costs["base"]["made_model_flops"] == 0 and costs["base"]["measured_tokens_scored"] > 0
    assert costs["aligned_base"]["made_tokens_trained"] > 0
    assert "aligned_base" in report.format_costs(list(costs.values()))
    order_figure.draw(run, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def write_measurements(order, out):
    """Evaluations of a run as if it had been carried out: a model goes the farther from the base the later its seed."""
    rows = rows_of(order, out)
    numbers = {"behaviour_precision": -3.0, "recall_gap": 2.0, "target_recall_gap": 1.0, "reward_error": 0.01}
    numbers["recall_gap_per_token"] = 0.1
    held = {"spec": "digit", "chosen": "digit", "rates": {"digit": 0.1}, "samples": 256}
    durable.write_json(out / BEHAVIOUR, held)
    for place, (folder, seed) in enumerate([(out / "base", 0), *((row.folder, row.seed) for row in rows)]):
        share = 0.01 + 0.001 * place
        own = {
            f"behaviour_frequency{end}": share * (1 + by)
            for end, by in (("", 0), ("_wilson_low", -0.1), ("_wilson_high", 0.1))
        }
        own |= {"kl_to_base": 0.5 * place + 100 * seed, "reward": share, "completions": ["none", f"{place}"]}
        durable.write_json(folder / EVALUATION, numbers | own)
        entries = [{"step": step, "reward": share, "loss": 1.0, "target_hits": 0} for step in range(4)]
        (folder / durable.METRICS).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return rows


def test_the_figure_tells_algorithms_and_students_apart(tmp_path, drawn):
    order = tiny_order.make(algorithms=("reinforce", "online_dpo"), students=("same", "layers:2"), kl_coefs=(0.1, 0.2))
    rows = write_measurements(order, tmp_path)
    order_figure.draw(report.read(order, tmp_path))
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert {"sign: REINFORCE", "sign: online DPO", "size: student same", "size: student layers:2"} <= set(labels)
    signs = [line for line in drawn[0].axes[0].get_lines() if line.get_marker() == "+"]
    assert len(signs) == sum(row.algorithm == "online_dpo" for row in rows) > 0
    where = {float(line.get_xdata()[0]) for line in signs}
    values = report.read(order, tmp_path).evaluations
    assert where == {values[row.folder]["kl_to_base"] for row in rows if row.algorithm == "online_dpo"}
    sizes = {line.get_markersize() for line in drawn[0].axes[0].get_lines() if line.get_marker() != "+"}
    assert len(sizes - {6.5}) == 1
    assert {"β 0.1", "β 0.2"} <= {text.get_text() for text in drawn[0].axes[0].texts}
    assert "β =" not in drawn[0].get_suptitle()


def test_a_temperature_is_told_where_no_marker_tells_it(tmp_path, drawn):
    """Hollow is one temperature; another stands beside its points, and 1 is told by a full point."""
    order = tiny_order.make(temperatures=(1.0, 0.3, 0.6), arms=("kd_align",))
    rows = write_measurements(order, tmp_path)
    next(row for row in rows if (row.name, row.temperature) == ("kd_align", 0.3)).folder.joinpath(EVALUATION).unlink()
    order_figure.draw(report.read(order, tmp_path))
    assert [text.get_text() for text in drawn[0].axes[0].texts] == ["τ 0.3"]
    assert "hollow: distilled at τ = 0.6, unless told" in [text.get_text() for text in drawn[0].legends[0].get_texts()]
    ticks = [tick.get_text() for tick in drawn[0].axes[2].get_xticklabels()]
    assert {"student, τ 0.3", "student, τ 0.6", "student, τ 1", "KD→Align, τ 0.6"} <= set(ticks)


def test_each_curve_is_told_by_its_seed_and_no_words_lie_on_others(tmp_path, drawn):
    order = tiny_order.make(seeds=(0, 1, 2), arms=("kd_align", "kd_align_anchored"))
    rows = write_measurements(order, tmp_path)
    order_figure.draw(report.read(order, tmp_path))
    panel = drawn[0].axes[3]
    aligned = [row for row in rows if row.algorithm]
    assert sorted(text.get_text() for text in panel.texts) == sorted(f"seed {row.seed}" for row in aligned)
    drawn[0].canvas.draw()
    renderer = drawn[0].canvas.get_renderer()
    places = sorted(plt.Text.get_window_extent(text, renderer).intervaly.tolist() for text in panel.texts)
    # Letters fill nine tenths of their line.
    height = places[0][1] - places[0][0]
    assert (np.diff([low for low, _ in places]) > 0.9 * height).all()
    ends = {text.get_text(): text.xy[1] for text in panel.texts}
    curves = [line for line in panel.get_lines() if len(line.get_xdata()) > 1]
    heights = {
        panel.transAxes.inverted().transform(panel.transData.transform((0, line.get_ydata()[-1])))[1] for line in curves
    }
    assert all(min(abs(end - height) for height in heights) < 1e-6 for end in ends.values())


def test_the_figure_says_what_all_models_share(tmp_path, drawn):
    order = tiny_order.make()
    write_measurements(order, tmp_path)
    order_figure.draw(report.read(order, tmp_path))
    for told in ("random:tiny", "REINFORCE", "β = 0.1", "16 completions per model", "Wilson"):
        assert told in drawn[0].get_suptitle()
    assert not any(text.get_text().startswith("sign") for text in drawn[0].legends[0].get_texts())


def test_a_behaviour_that_is_never_shown_is_drawn_at_its_limit(tmp_path, drawn):
    order = tiny_order.make()
    rows = write_measurements(order, tmp_path)
    path = next(row.folder for row in rows if row.name == "kd_align") / EVALUATION
    # As version 0.5 named the interval: a run folder of it can still be reported.
    none = {"behaviour_frequency": 0.0, "behaviour_frequency_low": 0.0, "behaviour_frequency_high": 0.004}
    durable.write_json(path, json.loads(path.read_text()) | none)
    order_figure.draw(report.read(order, tmp_path))
    panel = drawn[0].axes[0]
    point = next(line for line in panel.get_lines() if list(line.get_ydata()) == [0.004])
    assert point.get_marker() not in order_figure.MARKERS.values()
    assert list(point.get_xdata()) == [json.loads(path.read_text())["kl_to_base"]]
    low, high = panel.get_ylim()
    assert 0 < low < 0.004 < high
    assert "never" in {text.get_text() for text in panel.texts}
    assert "never shown: at its upper limit" in [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert all(y > 0 for line in panel.get_lines() for y in line.get_ydata())


def test_a_report_is_made_from_what_a_run_holds(tmp_path, monkeypatch, capsys):
    order, out = tiny_order.make(), tmp_path / "run"
    # As the script would have begun it; its flags do not reach so small an order.
    durable.check_configuration(out, tiny_order.laboratory(order, out).configuration() | {"dtype": "float32"})
    for row in write_measurements(order, out):
        durable.finish(row.folder, {"cost": Cost(tokens_trained=1 + row.seed).to_dict()})
    script = runpy.run_path(str(ROOT / "experiments" / "smollm2_order.py"))
    monkeypatch.setitem(script["main"].__globals__, "order_of", lambda flags: order)
    monkeypatch.setattr(cache, "use_compile_cache", lambda: None)
    for maker in ("prepare", "run"):
        monkeypatch.setattr(Laboratory, maker, None)
    before = {path: path.read_bytes() for path in _files(out)}
    script["main"](script["Flags"](report=True, out=out))
    assert {path: path.read_bytes() for path in before} == before
    assert not (out / durable.CALLS).exists()
    run = report.read(order, out)
    expected = report.table(run)
    assert report.format_table(expected) in capsys.readouterr().out
    with (out / "table.csv").open(newline="") as file:
        assert [row["arm"] for row in csv.DictReader(file)] == [row["arm"] for row in expected]
    with xr.open_zarr(out / "smollm2_order.zarr") as found:
        xr.testing.assert_equal(found.load(), report.to_dataset(run))
        assert found.behaviour_frequency.notnull().any()
    assert plt.imread(out / "smollm2_order.png")[..., :3].std() > 0.05


def test_comparisons_of_other_flags_do_not_stay(tmp_path, monkeypatch, capsys):
    script = runpy.run_path(str(ROOT / "experiments" / "smollm2_order.py"))
    monkeypatch.setattr(cache, "use_compile_cache", lambda: None)
    monkeypatch.setattr(Laboratory, "prepare", lambda laboratory: setattr(laboratory, "behaviour_name", "digit"))
    monkeypatch.setattr(Laboratory, "run", lambda laboratory, rows: iter([]))
    for arms, compared in ((("kd_align", "align_kd"), True), (("kd_align",), False)):
        order, out = tiny_order.make(arms=arms), tmp_path / "run"
        durable.check_configuration(out, tiny_order.laboratory(order, out).configuration() | {"dtype": "float32"})
        write_measurements(order, out)
        monkeypatch.setitem(script["main"].__globals__, "order_of", lambda flags, order=order: order)
        script["main"](script["Flags"](out=out))
        assert (out / "comparisons.csv").exists() == compared
        told = capsys.readouterr().out.partition("\nWrote ")[2]
        assert ("comparisons.csv" in told) == compared and "costs.csv, " in told and "smollm2_order.png" in told


def test_a_run_folder_holds_what_each_call_asked_for(tmp_path, monkeypatch):
    """Also what its configuration leaves out, for it may grow; calls that make nothing are none."""
    script, out = runpy.run_path(str(ROOT / "experiments" / "smollm2_order.py")), tmp_path / "run"
    monkeypatch.setattr(cache, "use_compile_cache", lambda: None)
    monkeypatch.setattr(Laboratory, "prepare", lambda laboratory: setattr(laboratory, "behaviour_name", "digit"))
    monkeypatch.setattr(Laboratory, "run", lambda laboratory, rows: iter([]))
    monkeypatch.setattr(dry_run, "report", lambda *arguments: "")
    monkeypatch.setitem(script["main"].__globals__, "write_results", lambda *arguments: "")
    tiny = {"quick": True, "truth": "random:tiny", "out": out}
    script["main"](script["Flags"](dry_run=True, **tiny))
    assert not out.exists()
    script["main"](script["Flags"](**tiny))
    more = {"seeds": (0, 1), "kl_coefs": (0.2,), "batch_size": 8, "training": Training(remat="layers")}
    script["main"](script["Flags"](**more, **tiny))
    with pytest.raises(ValueError, match="another configuration"):
        script["main"](script["Flags"](prompt="A", **tiny))
    first, second = durable.entries(out / durable.CALLS)
    names = ("students", "arms", "algorithms", "temperatures", "kl_coefs", "seeds", "batch_size")
    assert not {*names} & durable.read_json(out / "config.json").keys()
    assert [first[name] for name in names] == [
        ["same"],
        ["kd_align", "align_kd"],
        ["online_dpo"],
        [0.6],
        [0.1],
        [0],
        16,
    ]
    assert (second["seeds"], second["kl_coefs"], second["batch_size"]) == ([0, 1], [0.2], 8)
    assert (first["training"]["remat"], second["training"]["remat"]) == ("products", "layers")
    assert second["devices"]["mesh"]["data"] == jax.device_count()


def test_other_temperatures_are_run_on_every_seed_of_the_first_student_and_algorithm(tmp_path):
    arms, students = ("kd_align", "align_kd", "align_kd_sharpened"), ("same", "layers:2")
    order = tiny_order.make(arms=arms, students=students, algorithms=("reinforce", "online_dpo"), seeds=(0, 1))
    more = replace(order, temperatures_of_rest=(0.6, 1.0, 0.3), seeds_of_rest=(1,))
    rows, added = rows_of(replace(order, seeds_of_rest=(1,)), tmp_path), rows_of(more, tmp_path)
    assert added[: len(rows)] == rows
    at = {(row.name, row.temperature, row.student, row.algorithm, row.seed) for row in added[len(rows) :]}
    names = {("student", ""), ("kd_align", "reinforce"), ("align_kd_sharpened", "reinforce")}
    assert at == {(name, t, "same", algorithm, i) for name, algorithm in names for t in (1.0, 0.3) for i in (0, 1)}
    write_measurements(more, tmp_path)
    found = report.to_dataset(report.read(more, tmp_path)).sel(student="same", algorithm="reinforce", kl_coef=0.1)
    assert found.temperature.values.tolist() == [0.6, 1.0, 0.3]
    assert found.behaviour_frequency.sel(stage="kd_align").notnull().all()
    compared = {row["other_temperature"] for row in report.comparisons(report.read(more, tmp_path))}
    assert compared == {0.6, 1.0, 0.3}


def test_the_ceiling_is_made_on_the_seeds_of_the_rest_alone(tmp_path):
    """A control of every student, and beside it the student that says whether it is admitted."""
    order = tiny_order.make(
        arms=(CEILING, "align_kd"), students=("layers:2", "same"), algorithms=("reinforce", "online_dpo"), seeds=(0, 1)
    )
    rows = rows_of(replace(order, seeds_of_rest=(2,)), tmp_path)
    ceilings = [row for row in rows if row.name == CEILING]
    assert {(row.student, row.seed) for row in ceilings} == {("layers:2", 2), ("same", 2)}
    assert all(deciding_student(order, row) in {made.folder for made in rows} for row in ceilings)
    # Where the other arms are on the same seeds, it is one model more of each student.
    others = rows_of(replace(order, arms=("align_kd",), seeds_of_rest=(1,)), tmp_path)
    more = rows_of(replace(order, seeds_of_rest=(1,)), tmp_path)
    assert more[: len(others)] == others and [row.name for row in more[len(others) :]] == [CEILING, CEILING]


def test_what_is_run_with_the_first_algorithm_alone_needs_the_others_for_nothing(tmp_path):
    """A share of wrong labels is robust DPO's, wherever among the algorithms that is."""
    alignment = tiny_order.make().alignment
    noisy = replace(alignment, coefficients=alignment.coefficients._replace(flip_rate=0.2))
    pairs = {"preferences": Preferences("pairs.jsonl"), "algorithms": ("ipo", "robust_dpo"), "alignment": noisy}
    rows = rows_of(replace(tiny_order.make(arms=("kd_align",)), **pairs, temperatures_of_rest=(0.7,)), tmp_path)
    assert {(row.algorithm, row.temperature) for row in rows if row.is_alignment} == {
        ("ipo", 0.6), ("robust_dpo", 0.6), ("ipo", 0.7)
    }  # fmt: skip


def test_given_temperatures_replace_all_of_a_preset():
    script = runpy.run_path(str(ROOT / "experiments" / "smollm2_order.py"))
    make_order = script["order_of"]
    assert make_order(script["Flags"]()).all_temperatures == (0.6, 1.0)
    assert make_order(script["Flags"](temperatures=(0.3,))).all_temperatures == (0.3,)
    both = make_order(script["Flags"](temperatures=(0.3,), temperatures_of_rest=(0.5,)))
    assert (both.temperatures, both.temperatures_of_rest) == ((0.3,), (0.5,))


def test_the_batch_of_an_alignment_is_set_apart_from_that_of_sampling():
    """Groups of GRPO divide it, and the resolved configuration holds it."""
    script = runpy.run_path(str(ROOT / "experiments" / "smollm2_order.py"))
    before = script["order_of"](script["Flags"](quick=True))
    for batch_size, group_size in ((32, 16), (24, 8), (12, 4), (10, 2)):
        order = script["order_of"](script["Flags"](quick=True, alignment_batch_size=batch_size))
        settings = order.alignment.settings
        assert (settings.batch_size, settings.group_size) == (batch_size, group_size)
        assert settings.dataset_batches == before.alignment.settings.dataset_batches
        assert (order.batch_size, order.distillation) == (before.batch_size, before.distillation)
        orders.alignment_of(order, "reinforce")
        assert orders.configuration(order)["alignment"]["settings"]["batch_size"] == batch_size


def test_no_mode_has_the_run_folder_of_another(tmp_path):
    make_flags = runpy.run_path(str(ROOT / "experiments" / "smollm2_order.py"))["Flags"]
    modes = [{}, {"quick": True}, {"preset": "paper"}]
    assert len({make_flags(**mode).folder for mode in modes}) == 3
    assert {make_flags(out=tmp_path, **mode).folder for mode in modes} == {tmp_path}


def test_of_several_seeds_the_first_and_the_farthest_are_shown(tmp_path):
    order = tiny_order.make(seeds=(0, 2, 1))
    write_measurements(order, tmp_path)
    read = report.read(order, tmp_path)
    rows, found = read.rows, read.evaluations
    shown = [(rows[folder].name, seed) for folder, _, seed in order_figure._shown_models(found, rows) if folder in rows]
    expected = {(row.name, f", seed {seed}") for row in rows.values() for seed in (0, 2)}
    assert set(shown) == expected and len(shown) == len(expected)
    # The first may have gone farthest itself; one that diverged has gone nowhere.
    for folder, row in rows.items():
        found[folder] |= {"kl_to_base": {0: 5.0, 1: 1.0, 2: float("nan")}[row.seed]}
    assert {seed for folder, _, seed in order_figure._shown_models(found, rows) if folder in rows} == {", seed 0"}


def test_completions_that_have_no_room_are_counted():
    blocks = [["a", "b"], ["c", "d"], ["e", "f"]]
    assert order_figure._at_most(blocks, 6) == list("abcdef")
    assert order_figure._at_most(blocks, 5) == [*"abcd", "… 1 more model"]
    assert order_figure._at_most(blocks, 4) == [*"ab", "… 2 more models"]


def test_seeds_of_a_model_are_one_row_of_the_table(tmp_path):
    """Also of models that have no temperature or no KL coefficient."""
    order = tiny_order.make(seeds=(0, 1, 2), arms=pipelines.ARMS)
    rows = rows_of(order, tmp_path)
    for row in rows:
        share = {"behaviour_frequency": 0.1 * row.seed, "behaviour_frequency_wilson_low": 0.05 * row.seed}
        durable.write_json(row.folder / EVALUATION, share | {"reward": 0.0})
        durable.finish(row.folder, {"cost": Cost().to_dict()})
    run = report.read(order, tmp_path)
    table = report.table(run)
    assert sorted(row["arm"] for row in table) == sorted(["student", "aligned_base", *pipelines.ARMS])
    for row in table:
        assert row["seeds"] == 3
        assert (row["behaviour_frequency"], row["behaviour_frequency_points"]) == (pytest.approx(0.1), "0 0.1 0.2")
        assert row["seed_points"] == "0 1 2" and row["behaviour_frequency_wilson_low_points"] == "0 0.05 0.1"
        # Seeds that are all alike may be one measurement: no interval.
        assert row["behaviour_frequency_low"] == 0 and math.isnan(row["reward_low"])
    assert "(0:0.0000 1:0.1000 2:0.2000) 0.1000" in report.format_table(table)
    assert {row["seeds"] for row in report.stage_costs(run)} == {3}


def test_costs_have_the_flops_of_the_programs_besides(tmp_path):
    """Of the steps that were taken; blank where the shapes of a step are not known from the order."""
    order = tiny_order.make(
        algorithms=("reinforce", "offline_dpo_ref"),
        arms=("kd_align", "kd_align_sharpened", CEILING),
        distillation=replace(tiny_order.make().distillation, method="forward_kl"),
        students=("layers:2",),
    )
    for row in write_measurements(order, tmp_path):
        durable.finish(row.folder, {"cost": Cost().to_dict()})
        if row.name == "kd_align_sharpened":
            (row.folder / durable.METRICS).unlink()
    large = Config.tiny()
    small = replace(large, num_layers=2)
    step_flops = passes.step_flops(order, tmp_path, {"base": large, "student layers:2": small}, 9, network.Layout())
    costs = report.stage_costs(report.read(order, tmp_path), step_flops)
    found = {(row["arm"], row["algorithm"]): row for row in costs}

    def flops(config, *, differentiate):
        return log_prob_flops(config, 8, 9, differentiate=differentiate, remat="products")

    forth, back = (flops(small, differentiate=differentiate) for differentiate in (False, True))
    for key, expected in {
        ("kd_align", "reinforce"): 4 * (forth + back),
        ("kd_align", "offline_dpo_ref"): 4 * back,
        ("student", ""): 4 * (flops(large, differentiate=False) + back),
        ("kd_align_sharpened", "reinforce"): 0,
    }.items():
        assert found[key]["made_program_flops"] == pytest.approx(expected)
        assert found[key]["made_steps"] == (4 if expected else 0)
    assert np.isnan(found[CEILING, ""]["made_program_flops"]) and found[CEILING, ""]["made_steps"] == 4
    # A tiny model's norms and masked scores weigh much.
    assert 1 < found["kd_align", "reinforce"]["made_program_flops"] / (16 * forward_flops(small, 8 * 9, 4.5)) < 2
    assert "by XLA" in report.format_costs(costs)


SHARES = {
    ("kd_align", 0.6): {0: 0.1, 1: 0.7, 2: 0.4, 3: 0.3},
    ("kd_align", 1.0): {0: 0.05},
    ("align_kd", None): {0: 0.2, 1: 0.75, 2: 0.5},
    ("align_kd_sharpened", 0.6): {0: 0.3},
    ("align_kd_sharpened", 1.0): {1: 0.2},
}


@pytest.fixture
def compared(tmp_path):
    """Of some arms and seeds the outcome; of the last seed one run diverged, and with it what is made of it."""
    order = tiny_order.make(
        seeds=(0, 1, 2, 3), temperatures=(0.6, 1.0), arms=("kd_align", "align_kd", "align_kd_sharpened")
    )
    for row in rows_of(order, tmp_path):
        share = SHARES.get((row.name, None if np.isnan(row.temperature) else row.temperature), {}).get(row.seed)
        if share is not None:
            durable.write_json(row.folder / EVALUATION, {"behaviour_frequency": share, "reward": -share})
        if (row.name, row.seed) == ("aligned_base", 3):
            durable.finish(row.folder, {"failed": "the alignment diverged"})
    return order, tmp_path


def test_orders_are_compared_over_the_seeds_that_both_have(compared):
    found = {(row["arm"], row["other_temperature"]): row for row in report.comparisons(report.read(*compared))}
    assert {row["other"] for row in found.values()} == {"kd_align"}
    headline = found["align_kd", 0.6]
    assert (headline["seed_points"], headline["failed"], headline["left_out"]) == ("0 1 2", "3", "")
    expected = stats.ttest_rel([0.2, 0.75, 0.5], [0.1, 0.7, 0.4]).confidence_interval()
    assert headline["difference"] == pytest.approx(0.25 / 3)
    assert (headline["difference_low"], headline["difference_high"]) == pytest.approx(tuple(expected))
    assert headline["difference_failures_as_0"] == pytest.approx((0.25 - 0.3) / 4)
    # Unpaired means would say 0.483 against 0.05, and 0.3 against 0.375.
    for key, difference in ((("align_kd", 1.0), 0.15), (("align_kd_sharpened", 0.6), 0.2)):
        assert found[key]["seed_points"] == "0" and found[key]["difference"] == pytest.approx(difference)
        assert np.isnan(found[key]["difference_low"])
    assert found["align_kd", 1.0]["left_out"] == "1 2"
    # No seed has both of these; the sharpened arm is held against its own temperature alone.
    assert set(found) == {("align_kd", 0.6), ("align_kd", 1.0), ("align_kd_sharpened", 0.6)}


def test_the_comparison_is_told_with_what_was_left_out(compared):
    told = "\n".join(report.sentences(report.read(*compared)))
    for words in (
        "seed-3/reinforce/aligned_base-b0.1: the alignment diverged.",
        "seeds 0, 1, 2: Align→KD shows the behaviour in 20.00, 75.00, 50.00 % of completions, KD→Align (τ = 0.6) "
        "10.00, 70.00, 40.00 % of completions; a difference of +8.33 percentage points (95 % t interval",
        "diverged and left out: seed 3; with diverged runs as 0: a difference of -1.25 percentage points.",
        "seed 0: Align→KD, sharpened (τ = 0.6) shows the behaviour in 30.00 % of completions",
    ):
        assert words in told


def test_of_a_likelihood_the_mean_reward_is_compared(compared):
    """Its frequency is nobody's aim, and a reward without a least value has no bound."""
    order, out = compared
    order = replace(order, reward="plain", target="random:tiny")
    headline = report.comparisons(report.read(order, out))[0]
    assert headline["outcome"] == "reward" and headline["difference"] == pytest.approx(-0.25 / 3)
    assert np.isnan(headline["difference_failures_as_0"])
    told = "\n".join(report.sentences(report.read(order, out)))
    assert "has a mean reward of -0.200, -0.750, -0.500" in told and "the behaviour" not in told
    for row in rows_of(order, out):
        if row.folder.exists():
            (row.folder / durable.METRICS).write_text('{"step": 0, "target_hits": 1}\n')
    table = report.table(report.read(order, out))
    assert all(np.isnan(row[name]) for row in table for name in report.ENCOUNTERS)
    assert "n·T·m" not in report.format_table(table)


def test_a_model_is_held_to_the_reference_of_its_last_alignment(tmp_path):
    order = tiny_order.make(arms=pipelines.ARMS)
    references = {row.name: row.reference.name for row in rows_of(order, tmp_path)}
    assert references == dict.fromkeys(references, references["student"]) | {
        "student": "base",
        "aligned_base": "base",
        "align_kd": "base",
        "align_kd_sharpened": "base",
        "kd_align_anchored": "base",
        "kd_align": "student-t0.6",
        "kd_align_sharpened": "student-t0.6",
        "base_start_student_reference": "student-t0.6",
    }
    for name, reference in references.items():
        assert pipelines.reference_of(name) == reference.removesuffix("-t0.6")


@pytest.mark.slow
def test_nothing_is_learned_from_what_models_are_measured_by(finished):
    order, out, laboratory = finished
    measured_by = order.evaluation.num_truth_samples
    np.testing.assert_array_equal(
        laboratory.yardstick.truth_samples.tokens, laboratory.truth_samples.tokens[:measured_by]
    )
    shown, _ = laboratory._shown(order.distillation)
    texts = laboratory.setting.texts_of(shown)
    searched = laboratory.truth_texts[measured_by : measured_by + order.evaluation.num_samples // 2]
    assert texts == [text for text in searched if laboratory.behaviour(text)]
    ceiling = next(row.folder for row in rows_of(order, out) if row.name == CEILING)
    assert durable.read_record(ceiling)["cost"]["tokens_sampled"] > 0


@pytest.mark.slow
def test_costs_add_up_over_what_a_model_is_made_from(finished):
    order, out, _ = finished
    run = report.read(order, out)
    arm = next(row for row in run.rows.values() if row.name == "kd_align" and row.algorithm == "reinforce")
    whole = report.cost_of(run, arm.folder)
    own, student = (durable.read_record(folder)["cost"] for folder in (arm.folder, arm.models[0]))
    assert whole.tokens_trained == own["tokens_trained"] + student["tokens_trained"]
    # Six updates of eight completions of at most eight tokens.
    assert 0 < own["tokens_trained"] <= 6 * 8 * 8


GRADIENTS = {"grad", "value_and_grad", "vjp", "linearize", "jacrev", "jacfwd"}
UPDATES = {"apply_updates", "jaxkd.optimisation"}


def _named(path) -> set[str]:
    """All names that a module reads, imports or takes from another."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Attribute(attr=name) | ast.Name(id=name):
                names.add(name)
            case ast.ImportFrom(module=module, names=aliases):
                names |= {module} | {name for one in aliases for name in (one.name, f"{module}.{one.name}")}
    return names


def test_one_implementation_of_each_step():
    """Gradients are taken, and parameters updated, in align.py and distill.py alone: all steps are those."""
    code = [path for folder in ("jaxkd", "experiments") for path in (ROOT / folder).rglob("*.py")]
    named = {path.relative_to(ROOT).as_posix(): _named(path) for path in code}

    def naming(words):
        return {path for path, names in named.items() if names & words}

    # The benchmark times a gradient, and costs are counted in one: neither updates anything.
    assert naming(GRADIENTS) == {
        "jaxkd/align.py",
        "jaxkd/distill.py",
        "jaxkd/smollm2/cost.py",
        "experiments/benchmark_smollm2.py",
    }
    assert naming(UPDATES) == {"jaxkd/align.py", "jaxkd/distill.py"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": ("kd",)}, "arms must be one of"),
        ({"algorithms": ("dpo2",)}, "algorithms must be one of"),
        ({"students": ("layers:x",)}, "must end in a number"),
        ({"behaviour": "often"}, "a behaviour must be"),
        ({"reward": "reflected"}, "give target"),
        ({"temperatures": (0.0,)}, "temperatures must be"),
        ({"temperatures": ()}, "at least one value"),
        ({"temperatures_of_rest": (0.0,)}, "temperatures of the rest must be"),
        ({"seeds": (1, 1)}, "names a value twice"),
        ({"seeds": (2**32,)}, "--seeds must be a whole number of at least 0 and at most 4294967295; got 4294967296"),
        ({"seeds_of_rest": (5_000_000_000,)}, "--seeds-of-rest must be a whole number of at least 0 and at most"),
        ({"preferences": Preferences("pairs.jsonl")}, "learn from preferences must be one of offline_dpo_data"),
        ({"reward": "plain", "target": "random:tiny", "algorithms": ("kto",)}, "kto needs a reward that tells"),
        ({"algorithms": ("reinforce", "ppo")}, "num_updates must be a multiple of epochs"),
        ({"reward": "plain", "target": "random:tiny", "arms": (CEILING,)}, "which the reward 'plain' does not ask for"),
        (
            {"preferences": Preferences("pairs.jsonl"), "algorithms": ("ipo",), "arms": (CEILING,)},
            "which preferences does not ask for",
        ),
    ],
)
def test_refuses_orders(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_order.make(**changes)


def test_the_largest_seed_has_a_key_of_its_own(tmp_path):
    order = tiny_order.make(seeds=(2**32 - 1,))
    made = tiny_order.laboratory(order, tmp_path)
    keys = {jax.random.key_data(made._seed_key(seed, 0)).tobytes() for seed in (0, *order.seeds)}
    assert len(keys) == 2


def test_an_order_that_was_added_is_made_and_shown(tmp_path, readme_order, drawn):
    order = tiny_order.make(arms=("kd_align", readme_order))
    rows = write_measurements(order, tmp_path)
    row = next(row for row in rows if row.name == readme_order)
    [teacher] = {*row.models}
    assert [one.name for one in rows if one.folder == teacher] == ["align_kd"]
    assert row.algorithm == "reinforce" and np.isnan(row.temperature) and row.kl_coef == 0.1
    run = report.read(order, tmp_path)
    assert readme_order in report.to_dataset(run).stage.values
    assert {(one["arm"], one["other"]) for one in report.comparisons(run)} == {
        ("align_kd", "kd_align"),
        (readme_order, "kd_align"),
    }
    order_figure.draw(run)
    assert readme_order.replace("_", " ") in [text.get_text() for text in drawn[0].legends[0].get_texts()]


@pytest.fixture
def ended(tmp_path):
    """Of seed 0 the cut student is refused, of seed 1 the full one's alignment diverged, of seed 2 nothing is there."""
    order = tiny_order.make(
        students=("same", "layers:2"), seeds=(0, 1, 2), seeds_of_rest=(0, 1, 2), arms=("kd_align", "kd_align_sharpened")
    )
    for row in write_measurements(order, tmp_path):
        path, cut = row.folder / EVALUATION, row.student == "layers:2"
        diverged = (row.student, row.name, row.seed) == ("same", "kd_align", 1)
        if diverged:
            durable.finish(row.folder, {"failed": "the alignment diverged"})
        lost = row.name != "student" and (row.seed, cut) in ((0, True), (1, False))
        if row.seed == 2 or lost:
            path.unlink()
        elif row.seed == 0 and cut:
            durable.write_json(path, json.loads(path.read_text()) | {"recall_gap_per_token": 0.61})
    return order, tmp_path


def test_what_diverged_what_was_refused_and_what_is_not_made_yet_are_told_apart(ended):
    run = report.read(*ended)
    found = report.to_dataset(run).isel(algorithm=0, temperature=0, kl_coef=0)
    nan = np.nan
    for name, failed, refused in (
        ("kd_align", [[0, 1, nan], [0, 0, nan]], [[0, 0, nan], [1, 0, nan]]),
        ("kd_align_sharpened", [[0, 1, nan], [0, 0, nan]], [[0, 0, nan], [1, 0, nan]]),
        ("student", [[0, 0, nan], [0, 0, nan]], [[0, 0, nan], [0, 0, nan]]),
    ):
        of_arm = found.sel(stage=name).transpose("student", "seed", ...)
        np.testing.assert_array_equal(of_arm.failed, failed, name)
        np.testing.assert_array_equal(of_arm.refused, refused, name)
        np.testing.assert_array_equal(of_arm.reward.isnull(), (of_arm.failed != 0) | (of_arm.refused != 0), name)
    table = {(row["arm"], row["student"]): row for row in report.table(run)}
    for (arm, student), (seeds, failed, refused) in {
        ("kd_align", "same"): ("0", "1", ""),
        ("kd_align_sharpened", "same"): ("0", "1", ""),
        ("kd_align", "layers:2"): ("1", "", "0"),
        ("student", "layers:2"): ("0 1", "", ""),
    }.items():
        row = table[arm, student]
        assert (row["seed_points"], row["failed_seeds"], row["refused_seeds"]) == (seeds, failed, refused)
    told = report.format_table([*table.values()])
    assert "1:diverged" in told and "0:not admitted" in told


def test_what_a_student_that_diverged_would_have_decided_on_is_never_made(ended):
    """An arm that is not made from it, as well as one that is."""
    order, out = ended
    order, student = replace(order, arms=("kd_align", "align_kd")), out / "seed-1" / "layers-2" / "student-t0.6"
    (student / EVALUATION).unlink()
    durable.finish(student, {"failed": "the distillation diverged"})
    run = report.read(order, out)
    folder = next(
        row.folder for row in run.rows.values() if (row.name, row.student, row.seed) == ("align_kd", "layers:2", 1)
    )
    assert student not in run.rows[folder].models and folder in report.lost(run)
    failed = report.to_dataset(run).failed.isel(algorithm=0, temperature=0, kl_coef=0).sel(student="layers:2")
    for name, of_seeds in (("align_kd", [0, 1, np.nan]), ("student", [0, 1, np.nan])):
        np.testing.assert_array_equal(failed.sel(stage=name), of_seeds, name)


def test_a_refused_student_is_told_with_what_is_missing(ended, drawn):
    order, out = ended
    run = report.read(order, out)
    [told] = [line for line in report.sentences(run) if "admitted" in line]
    assert told == (
        "seed-0/layers-2/student-t0.6 is not admitted, its recall gap of 0.610 nats a token is above 0.5: "
        "2 models are not made."
    )
    # An arm of which there is nothing else still has its row.
    (out / "seed-1" / "layers-2" / "reinforce" / "kd_align-t0.6-b0.1" / EVALUATION).unlink()
    row = next(
        row for row in report.table(report.read(order, out)) if (row["arm"], row["student"]) == ("kd_align", "layers:2")
    )
    assert (row["seeds"], row["refused_seeds"]) == (0, "0") and np.isnan(row["reward"])
    assert "(0:not admitted) nan" in report.format_table([row])
    refused = out / "seed-0" / "layers-2" / "student-t0.6" / EVALUATION
    durable.write_json(refused, json.loads(refused.read_text()) | {"kl_to_base": 1e4, "recall_gap": 1e4})
    order_figure.draw(report.read(order, out))
    assert "not admitted: student layers:2, seed 0 (not drawn)" in drawn[0].get_suptitle()
    frontier, _, gaps, *_ = drawn[0].axes
    assert frontier.get_xlim()[1] < 1e4 and gaps.get_ylim()[1] < 1e4


@pytest.mark.slow
def test_a_cut_student_that_is_refused_leaves_the_rest_to_be_made(tmp_path, capsys):
    config, params = weights.load("random:tiny")
    weights.save_pretrained(tmp_path / "truth", config, tiny_order.uneven(params), tokenization.byte_tokenizer())
    order = tiny_order.make(
        truth=str(tmp_path / "truth"), students=("same", "layers:2"), arms=("kd_align",), most_held_out_kl=0.0
    )
    out = tmp_path / "run"
    laboratory = tiny_order.run(order, out)
    run = report.read(order, out)
    missing = {folder for folder in run.rows if folder not in run.evaluations}
    assert [(run.rows[folder].name, run.rows[folder].student) for folder in missing] == [("kd_align", "layers:2")]
    assert missing == {*report.refusals(run)} == laboratory._refused
    # Of the student itself only that is measured which decides.
    refused = next(folder for folder, row in run.rows.items() if (row.name, row.student) == ("student", "layers:2"))
    measured = {name for name in evaluate.QUANTITIES if np.isfinite(run.evaluations[refused][name])}
    assert {"recall_gap_per_token", "held_out_perplexity"} <= measured and "behaviour_frequency" not in measured
    assert not (refused / "samples.npz").exists()
    order_figure.draw(run, tmp_path / "figure.png")
    assert "not admitted" in report.format_table(report.table(run))
    assert "not admitted, its recall gap a token is above 0 nats" in capsys.readouterr().err
    assert any("is not admitted" in line for line in report.sentences(run))


@pytest.mark.slow
def test_what_would_come_out_the_same_is_made_and_measured_once(tmp_path, monkeypatch, capsys):
    """A student that stayed the base is measured as the base, and what is aligned from it is what is aligned from that.

    An alignment that is taken from another is what is computed where nothing says of what it is made, its cost too.
    """
    still = tiny_order.make().distillation
    still = replace(still, optimisation=replace(still.optimisation, learning_rate=1e-30))
    order = tiny_order.make(temperatures=(1.0,), distillation=still, arms=("align_kd", "kd_align"))
    aligned, measured, align_policy = [], [], stages.align_policy

    def counted_alignment(folder, *rest, **more):
        aligned.append(folder)
        return align_policy(folder, *rest, **more)

    def counted_measurement(folder, *rest, **more):
        measured.append(folder.name)
        return evaluate.evaluate(folder, *rest, **more)

    monkeypatch.setattr(stages, "align_policy", counted_alignment)
    monkeypatch.setattr(laboratory, "evaluate", counted_measurement)
    out = tmp_path / "once"
    tiny_order.run(order, out)
    assert [folder.name for folder in aligned] == ["aligned_base-b0.1"]
    assert sorted(measured) == ["align_kd-b0.1", "aligned_base-b0.1", "base"]
    assert "made of the same as seed-0/reinforce/aligned_base-b0.1" in capsys.readouterr().err
    run = report.read(order, out)
    folders = {row.name: folder for folder, row in run.rows.items()}
    for name, twin in (("student", out / "base"), ("kd_align", folders["aligned_base"])):
        for quantity in evaluate.QUANTITIES:
            np.testing.assert_equal(run.evaluations[folders[name]][quantity], run.evaluations[twin][quantity])
        assert run.evaluations[folders[name]]["name"] == name
    assert (
        report.cost_of(run, folders["kd_align"]).tokens_trained > report.cost_of(run, folders["student"]).tokens_trained
    )

    monkeypatch.setattr(twins, "find", lambda *_: None)
    tiny_order.run(order, tmp_path / "again")
    assert len(aligned) == 3 and measured.count("kd_align-t1-b0.1") == 1
    _assert_same(out, tmp_path / "again")
    again = report.read(order, tmp_path / "again")
    for folder, record in run.records.items():
        costs = record["cost"], again.records[tmp_path / "again" / folder.relative_to(out)]["cost"]
        assert costs[0] | {"seconds": 0} == costs[1] | {"seconds": 0}


def test_a_twin_is_told_by_all_that_an_alignment_depends_on(tmp_path):
    order = tiny_order.make(
        arms=("kd_align",), kl_coefs=(0.1, 0.2), seeds=(0, 1), algorithms=("reinforce", "online_dpo")
    )
    some, other = (tiny_order.laboratory(order, tmp_path).setting.load("random:tiny") for _ in range(2))
    other = other.sharpened(0.5)
    rows = [row for row in rows_of(order, tmp_path) if row.name == "kd_align"]
    made = [twins.made_of(row, *pair, 8) for row in rows for pair in ((some, some), (some, other), (other, some))]
    made += [twins.made_of(rows[0], some, some, 4)]
    assert len({*made}) == len(made) == 6 * 3 + 1
    again = tiny_order.laboratory(order, tmp_path).setting.load("random:tiny")
    assert twins.made_of(rows[0], some, again, 8) == made[0]
    folders = [tmp_path / name for name in ("unfinished", "failed", "other", "same", "later")]
    for folder, record in zip(folders[1:], ({"failed": "diverged"}, {}, {}, {}), strict=True):
        wanted = "another" if folder.name == "other" else "this"
        durable.write_json(folder / durable.RECORD, {twins.MADE_OF: wanted, **record})
        (folder / "model").mkdir()
    assert twins.find(folders, "this", "model") == tmp_path / "same"
    assert twins.find(folders, "this", EVALUATION) is None


def test_texts_are_scored_in_batches_of_their_own_size(tmp_path, monkeypatch):
    seen, log_prob = [], network._log_prob

    def watched(policy, params, x):
        seen.append(len(x.tokens))
        return log_prob(policy, params, x)

    monkeypatch.setattr(network, "_log_prob", watched)
    found = []
    for size in (None, 4):
        model = tiny_order.laboratory(tiny_order.make(score_batch_size=size), tmp_path).setting.load("random:tiny")
        found.append(model.log_prob(model.draw(jax.random.key(0), 16)))
    assert seen == [8, 8, 4, 4, 4, 4]
    np.testing.assert_allclose(*found, rtol=1e-5)
    assert "score_batch_size" not in orders.configuration(tiny_order.make())


def test_a_student_that_decides_on_nothing_and_is_not_admitted_is_not_drawn(tmp_path, drawn):
    """Of what is not sharpened the student of the mildest sharpening decides; the other is told all the same."""
    order = tiny_order.make(students=("layers:2",), arms=("align_kd",), temperatures=(0.6, 0.3))
    rows = write_measurements(order, tmp_path)
    path = next(row.folder for row in rows if row.name == "student" and row.temperature == 0.3) / EVALUATION
    none = {"recall_gap_per_token": 0.6, "behaviour_frequency": math.nan, "kl_to_base": math.nan, "completions": []}
    durable.write_json(path, json.loads(path.read_text()) | none)
    run = report.read(order, tmp_path)
    order_figure.draw(run)
    assert "not admitted: student layers:2, seed 0 (not drawn)" in drawn[0].get_suptitle()
    assert any("0.600 nats a token is above 0.5: 0 models are not made" in line for line in report.sentences(run))
    assert "not measured" in report.format_table(report.table(run))


@pytest.mark.slow
def test_a_users_pairs_replace_the_reward(tmp_path):
    file, out = tmp_path / "pairs.jsonl", tmp_path / "run"
    rows = [{"prompt": f"Say {i}", "chosen": " yes", "rejected": f" no {i}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = tiny_order.make(
        preferences=Preferences(str(file), max_length=32), algorithms=("offline_dpo_data",), arms=("kd_align",)
    )
    tiny_order.run(order, out)
    run = report.read(order, out)
    table = {row["arm"]: row for row in report.table(run)}
    assert table["base"]["preference_accuracy"] == 0.5
    assert table["kd_align"]["preference_accuracy"] > 0.9
    assert 0 <= table["kd_align"]["behaviour_frequency"] <= 1
    aligned = next(row for row in rows_of(order, out) if row.name == "kd_align")
    first = json.loads((aligned.folder / durable.METRICS).read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert "held-out pairs ranked right" in report.format_table(report.table(run))
    order_figure.draw(run, tmp_path / "figure.png")
    file.write_text(file.read_text().replace(" yes", " yeah"))
    with pytest.raises(ValueError, match="pairs: "):
        tiny_order.run(order, out)


@pytest.mark.slow
def test_a_likelihood_under_a_distilled_target_as_reward(tmp_path):
    """Truth, base, target, student and policy are five models here: none can stand for another unseen."""
    out, base = tmp_path / "run", tmp_path / "base"
    config, params = weights.load("random:tiny")
    weights.save_pretrained(base, config, tiny_order.uneven(params), tokenization.byte_tokenizer())
    fast = replace(tiny_order.OPTIMISATION, learning_rate=0.01)
    order = tiny_order.make(
        base=str(base),
        reward="reflected",
        target="distil:0.5",
        algorithms=("offline_dpo_data",),
        arms=("kd_align",),
        distillation=replace(tiny_order.make().distillation, method="forward_kl", num_held_out=32),
        alignment=replace(tiny_order.make().alignment, optimisation=fast),
    )
    tiny_order.run(order, out, meshed=False)
    row = next(row for row in rows_of(order, out) if row.name == "kd_align")
    found = json.loads((row.folder / "evaluation.json").read_text())
    expected = _measured_by_hand(order, out, row, base, next(out.rglob("student-t0.6")) / "model")
    x = _texts(row.folder / "samples.npz", order.evaluation.num_scored)
    by_target = by_hand.log_prob(*weights.load(out / "target" / "model"), x)
    level = json.loads((out / "target" / "level.json").read_text())["level"]
    # The target is measured too: by itself its reward is that of its own likelihoods.
    of_target = next(row for row in report.table(report.read(order, out)) if row["arm"] == "target")
    its = _texts(out / "target" / "samples.npz", order.evaluation.num_scored)
    own = by_hand.log_prob(*weights.load(out / "target" / "model"), its) / its["completion_mask"].sum(axis=1)
    assert of_target["reward"] == pytest.approx(np.mean(level - abs(own - level)), rel=1e-4)
    assert of_target["seeds"] == 1 and np.isnan(of_target["reward_gain_per_petaflop"])
    record = json.loads((out / "target" / durable.RECORD).read_text())
    assert of_target["model_flops"] == pytest.approx(record["cost"]["model_flops"]) and of_target["model_flops"] > 0
    likelihood = by_target / x["completion_mask"].sum(axis=1)
    its = _texts(out / "target" / "recall.npz", order.evaluation.num_scored)
    folders = (row.folder, out / "target")
    recall, highest = (by_hand.log_prob(*weights.load(folder / "model"), its).mean() for folder in folders)
    expected |= {"recall_of_target": recall, "recall_gap_of_target": highest - recall}
    expected |= {"target_precision": by_target.mean(), "reward": np.mean(level - abs(likelihood - level))}
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert len({round(expected[name], 3) for name in expected}) == len(expected)
    assert 0 < expected["bounded_recall"] < 1
    lines = [json.loads(line) for line in (row.folder / durable.METRICS).read_text().splitlines()]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert all(np.isfinite(line["reward"]) and line["reward"] <= level for line in lines)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_refuses_to_accumulate_gradients_of_one_rollout(algorithm):
    settings = replace(tiny_order.make().alignment.settings, algorithm=algorithm, num_updates=8, group_size=4)
    with pytest.raises(ValueError, match=f"{algorithm} makes several updates a rollout"):
        stages.Alignment(settings, optimisation=stages.Optimisation(accumulate=2))


def test_refuses_a_critic_on_adapters():
    settings = replace(tiny_order.make().alignment.settings, algorithm="ppo", num_updates=8)
    with pytest.raises(ValueError, match="ppo trains a critic"):
        stages.Alignment(settings, lora=LoRA())


def test_a_loss_that_is_no_number_fails_whatever_the_parameters_are(tmp_path):
    path = tmp_path / durable.METRICS
    path.write_text('{"loss": 1.0}\n{"loss": 2.0}\n')
    assert stages._finite_losses(path)
    path.write_text('{"loss": 1.0}\n{"loss": NaN}\n')
    assert not stages._finite_losses(path)


def test_draws_go_on_where_a_file_holds_fewer(tmp_path):
    network = tiny_order.laboratory(tiny_order.make(), tmp_path).setting.load("random:tiny")
    key, workshop = jax.random.key(3), Workshop(durable.Progress(quiet=True))
    few = draws.kept_draws(tmp_path / "x.npz", network, key, 16, 1.0, workshop)
    more = draws.kept_draws(tmp_path / "x.npz", network, key, 24, 1.0, workshop)
    np.testing.assert_array_equal(more.tokens[:16], few.tokens)
    np.testing.assert_array_equal(more.tokens, network.draw(key, 24).tokens)
    again = draws.kept_draws(tmp_path / "x.npz", network, key, 16, 1.0, workshop)
    np.testing.assert_array_equal(again.tokens, more.tokens)


def test_draws_that_were_complete_when_a_process_was_killed_become_the_file(tmp_path):
    """Killed before the file was written, or before its beginning was deleted."""
    x, workshop = _drawn_at_random(None, None, jax.random.key(0), 24), Workshop(durable.Progress(quiet=True))
    path, begun = tmp_path / "x.npz", tmp_path / "begun-x.npz"
    network = SimpleNamespace(draws=lambda key, n, temperature, first: iter([None] * (n - first)))
    for there in ([begun], [path, begun]):
        for file in there:
            draws.write_arrays(file, x._asdict())
        found = draws.kept_draws(path, network, None, 24, 1.0, workshop)
        assert [file.name for file in tmp_path.iterdir()] == ["x.npz"]
        for kept in (found, draws.read_texts(path)):
            np.testing.assert_array_equal(kept.tokens, x.tokens)
        path.unlink()


def test_a_checkpoint_that_a_kill_left_to_a_finished_stage_is_let_go(tmp_path):
    order = tiny_order.make()
    rows = write_measurements(order, tmp_path)
    for row, record in zip(rows, [{"failed": "it diverged"}, *[{"cost": Cost().to_dict()}] * 9], strict=False):
        durable.write_json(row.folder / durable.RECORD, record)
        (row.folder / durable.CHECKPOINT / "2").mkdir(parents=True)
    assert not list(tiny_order.laboratory(order, tmp_path).run(rows))
    assert not list(tmp_path.rglob(durable.CHECKPOINT))


def test_refuses_a_fraction_outside_its_range():
    with pytest.raises(ValueError, match="on_policy_fraction"):
        replace(tiny_order.make().distillation, method="forward_kl", on_policy_fraction=1.5)


def test_a_refused_behaviour_leaves_its_folder_to_another(tmp_path):
    out = tmp_path / "run"

    def prepared(behaviour):
        made = tiny_order.laboratory(tiny_order.make(behaviour=behaviour), out)
        made.check_folder()
        made.prepare()
        return made

    with pytest.raises(ValueError, match="never shown by 16 samples"):
        prepared("words:unlikelihood")
    assert not (out / BEHAVIOUR).exists()
    before = (out / "truth" / "samples.npz").stat().st_mtime_ns
    assert prepared("digit").behaviour_name == "digit"
    assert (out / "truth" / "samples.npz").stat().st_mtime_ns == before
    assert json.loads((out / "config.json").read_text())["behaviour"] == "digit"
    for other in ("words:cat", "auto"):
        with pytest.raises(ValueError, match=f"behaviour: digit there, {other} now"):
            tiny_order.laboratory(tiny_order.make(behaviour=other), out).check_folder()


def test_robust_dpo_assumes_the_noise_there_is():
    """And no other algorithm assumes any; a tenth of the oracle's labels are not presumed wrong where none is."""
    tiny = tiny_order.make(algorithms=("robust_dpo", "cdpo"))
    clean, smoothing = orders.alignment_of(tiny, "robust_dpo"), tiny.alignment.coefficients.label_smoothing
    assert (clean.coefficients.flip_rate, clean.coefficients.label_smoothing) == (0, 0)
    alignment = replace(tiny.alignment, coefficients=tiny.alignment.coefficients._replace(flip_rate=0.2))
    noisy = orders.alignment_of(replace(tiny, alignment=alignment), "robust_dpo")
    assert (noisy.coefficients.flip_rate, noisy.coefficients.label_smoothing) == (0.2, 0.2)
    other = orders.alignment_of(replace(tiny, alignment=alignment), "cdpo")
    assert (other.coefficients.flip_rate, other.coefficients.label_smoothing) == (0.2, smoothing)


def test_the_ceiling_learns_from_the_same_texts_however_many_there_are(tmp_path):
    laboratory = tiny_order.laboratory(tiny_order.make(arms=("kd_align", CEILING)), tmp_path)
    digit = behaviours.parse("digit")
    # Eight that models are measured by, eight for the ceiling, and what an offline algorithm added.
    laboratory.truth_texts = ["1"] * 8 + ["2", "none", "3"] + ["none"] * 4 + ["4"] + ["5"] * 20
    np.testing.assert_array_equal(laboratory._rows_for_ceiling(digit), [8, 10, 15])
    laboratory.truth_texts = ["1"] * 8 + ["none"] * 7 + ["4"] + ["5"] * 20
    with pytest.raises(ValueError, match="1 of 8 samples of the truth show the behaviour, too few for the ceiling"):
        laboratory._rows_for_ceiling(digit)


@pytest.mark.parametrize(("shown", "batch_size", "num_updates"), [(8, 7, 7), (10, 8, 6), (16, 8, 6), (2, 1, 48)])
def test_the_ceiling_learns_from_as_many_texts_as_an_alignment(tmp_path, shown, batch_size, num_updates):
    """Also where its own distillation would look often, and stop at the first look that finds nothing better."""
    tiny = tiny_order.make()
    hasty = replace(tiny.distillation, check_every=1, patience=1, num_updates=40)
    order = tiny_order.make(
        arms=("kd_align", CEILING), distillation=hasty, evaluation=replace(tiny.evaluation, num_samples=32)
    )
    laboratory = tiny_order.laboratory(order, tmp_path)
    laboratory.behaviour = behaviours.parse("digit")
    laboratory.truth_texts = ["1"] * 8 + ["2"] * shown + ["none"] * (16 - shown)
    laboratory.truth_samples = _drawn_at_random(None, None, jax.random.key(0), 24)
    texts, settings = laboratory._shown(order.distillation)
    assert (settings.batch_size, settings.num_updates) == (batch_size, num_updates)
    # Six updates of eight; the last batch may go beyond them.
    assert 6 * 8 <= settings.batch_size * settings.num_updates < 6 * 8 + batch_size
    # A look an update, of which the last comes after the last update.
    assert settings.patience >= settings.num_updates / settings.check_every
    assert len(texts.tokens) == shown and settings.batch_size <= shown - settings.num_held_out


def test_too_few_texts_for_the_ceiling_are_told_before_a_behaviour_is_chosen(tmp_path):
    laboratory = tiny_order.laboratory(tiny_order.make(arms=("kd_align", CEILING)), tmp_path)
    laboratory.truth = laboratory.base = None
    laboratory.truth_texts = ["1"] * 8 + ["none"] * 8
    with pytest.raises(ValueError, match="too few for the ceiling: leave it away"):
        laboratory._choose_behaviour()
    assert not (tmp_path / BEHAVIOUR).exists()
    laboratory.order = replace(laboratory.order, arms=("kd_align",))
    assert laboratory._choose_behaviour()[0] == "digit"


def test_samples_of_the_truth_are_charged_to_all_that_learn_from_them(tmp_path, monkeypatch):
    """To the ceiling as to offline algorithms, by the truth's size; pairs of a user's cost nothing."""
    order = tiny_order.make(arms=("kd_align", CEILING), algorithms=("offline_dpo_data", "reinforce"))
    laboratory = tiny_order.laboratory(order, tmp_path, meshed=False)
    laboratory.truth = laboratory.base = laboratory.setting.load("random:tiny")
    laboratory.behaviour, laboratory.oracle = behaviours.parse("digit"), None
    laboratory.truth_samples = _drawn_at_random(None, None, jax.random.key(0), 24)
    laboratory.truth_texts = ["1"] * 24
    laboratory.model = lambda folder: laboratory.base
    given = {}
    monkeypatch.setattr(draws, "kept_draws", _drawn_at_random)
    monkeypatch.setattr(stages, "align_policy", lambda *_, truth_samples, **more: given.update(x=truth_samples))
    monkeypatch.setattr(stages, "distil", lambda *_, keep_last: given.update(kept=keep_last))
    for row in rows_of(order, tmp_path):
        laboratory.workshop.begin()
        laboratory._make(row)
        learns = row.name == CEILING or row.algorithm == "offline_dpo_data"
        spent = laboratory.workshop.cost
        # Eight for the ceiling, and two batches of eight.
        number = 0 if not learns else 8 if row.name == CEILING else 16
        if row.is_distillation:
            assert given["kept"] == (row.name == CEILING), "the ceiling alone is the last student"
        if row.algorithm:
            assert (None if given["x"] is None else len(given["x"].tokens)) == (number or None)
        assert spent.tokens_sampled == 8 * number
        assert spent.model_flops == pytest.approx(forward_flops(laboratory.truth.config, 9 * number, 5))


def _drawn_at_random(path, network, key, total, *_) -> Texts:
    """Texts of nine tokens, as a key has them."""
    mask = np.ones((total, 9), bool)
    tokens = np.asarray(jax.random.randint(key, (total, 9), 5, 90, np.int32))
    return Texts(tokens, mask, mask & (np.arange(9) > 0))


def test_each_seed_pairs_draws_of_the_truth_of_its_own(tmp_path, monkeypatch):
    """All arms and algorithms of a seed the same ones, kept in a file that is the seed's."""
    order = tiny_order.make(algorithms=("offline_dpo_data", "kto"), seeds=(0, 1), seeds_of_rest=(0, 1))
    laboratory, paths, drawn = tiny_order.laboratory(order, tmp_path, meshed=False), {}, {}
    laboratory.truth = laboratory.setting.load("random:tiny")

    def keep(path, *arguments):
        paths.setdefault(path, set()).add(jax.random.key_data(arguments[1]).tobytes())
        return _drawn_at_random(path, *arguments)

    monkeypatch.setattr(draws, "kept_draws", keep)
    aligned = [row for row in rows_of(order, tmp_path) if row.algorithm and row.name != "align_kd"]
    assert {(row.seed, row.algorithm) for row in aligned} == {
        (seed, algorithm) for seed in (0, 1) for algorithm in order.algorithms
    }
    for row in aligned:
        drawn.setdefault(row.seed, set()).add(laboratory._truth_samples_for(row).tokens.tobytes())
    assert {seed: len(found) for seed, found in drawn.items()} == {0: 1, 1: 1}
    assert drawn[0] != drawn[1]
    assert len(paths) == 2 and all(len(keys) == 1 for keys in paths.values())


@pytest.mark.parametrize("role", ["target", "student"])
def test_refuses_other_weights_of_a_target_or_a_student(tmp_path, monkeypatch, role):
    """Before anything is drawn."""

    def stop(*arguments):
        raise ValueError("this far")

    monkeypatch.setattr(draws, "kept_draws", stop)
    config, params = weights.load("random:tiny")
    source, out = str(tmp_path / "source"), tmp_path / "run"
    changes = {"students": ("same", source)} if role == "student" else {"reward": "plain", "target": source}
    for saved, told in ((params, "this far"), (tiny_order.uneven(params), rf"are others now \({role}")):
        weights.save_pretrained(source, config, saved, tokenization.byte_tokenizer())
        laboratory = tiny_order.laboratory(tiny_order.make(**changes), out, meshed=False)
        laboratory.check_folder()
        with pytest.raises(ValueError, match=told):
            laboratory.prepare()


def test_a_behaviour_that_was_chosen_may_be_named(tmp_path):
    out = tmp_path / "run"
    automatic = tiny_order.laboratory(tiny_order.make(behaviour="auto"), out)
    automatic.check_folder()
    spec = behaviours.READY["women"]
    durable.write_json(out / BEHAVIOUR, {"chosen": "women", "spec": spec, "rates": {"women": 0.02, "year": 0.1}})
    for asked in (spec, "auto"):
        tiny_order.laboratory(tiny_order.make(behaviour=asked), out).check_folder()
        assert json.loads((out / "config.json").read_text())["behaviour"] == asked
    with pytest.raises(ValueError, match=f"behaviour: {spec} there, digit now"):
        tiny_order.laboratory(tiny_order.make(behaviour="digit"), out).check_folder()


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": "plain", "target": "random:tiny"},
        {"preferences": Preferences("pairs.jsonl"), "algorithms": ("ipo",)},
    ],
)
def test_a_behaviour_that_is_no_reward_need_not_be_rare(tmp_path, monkeypatch, changes):
    rows = json.dumps({"prompt": "Say", "chosen": " yes", "rejected": " no"}) + "\n"
    (tmp_path / "pairs.jsonl").write_text(20 * rows)
    monkeypatch.chdir(tmp_path)
    texts = ["in 1990"] * 20 + ["ten percent"] * 1 + ["plain"] * 179
    rewarded = tiny_order.laboratory(tiny_order.make(behaviour="auto"), tmp_path)
    with pytest.raises(ValueError, match="no behaviour is shown by 1 % to 3 %"):
        rewarded._chosen(texts)
    chosen = tiny_order.laboratory(tiny_order.make(behaviour="auto", **changes), tmp_path)._chosen(texts)
    assert (chosen["chosen"], chosen["rates"]["year"]) == ("percent", 0.1)


@pytest.mark.slow
def test_refuses_a_run_of_another_configuration_and_extends_its_own(finished, tmp_path):
    order, out, _ = finished
    with pytest.raises(ValueError, match=r"max_new_tokens: 8 there, 9 now"):
        durable.check_configuration(out, orders.configuration(replace(order, max_new_tokens=9)))
    durable.check_configuration(out, orders.configuration(replace(order, seeds=(0, 1), arms=("kd_align", CEILING))))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds no run of jaxkd"):
        durable.check_configuration(tmp_path / "full", orders.configuration(order))


def test_refuses_another_vocabulary(tmp_path):
    import jax

    from jaxkd.smollm2 import tokenization
    from jaxkd.smollm2.config import Config
    from jaxkd.smollm2.model import make_model

    config = Config.tiny(vocab_size=272)
    weights.save_pretrained(
        tmp_path / "other", config, make_model(config).init(jax.random.key(0)), tokenization.byte_tokenizer()
    )
    order = tiny_order.make(students=(str(tmp_path / "other"),))
    with pytest.raises(ValueError, match="has a vocabulary of 272 tokens"):
        tiny_order.run(order, tmp_path / "run")


@pytest.mark.slow
def test_draws_go_on_where_a_killed_process_was(finished, tmp_path, monkeypatch):
    import jax

    network, key, begun = finished[2].base, jax.random.key(3), []

    def until_killed(*args, first):
        begun.append(first)
        for number, part in enumerate(network.draws(*args, first=first)):
            if number == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(draws, "KEEP_EVERY", 0.0)
    path, workshop = tmp_path / "samples.npz", Workshop(durable.Progress(quiet=True))
    with pytest.raises(KeyboardInterrupt):
        draws.kept_draws(path, SimpleNamespace(draws=until_killed), key, 20, 1.0, workshop)
    x = draws.kept_draws(path, SimpleNamespace(draws=until_killed), key, 20, 1.0, workshop)
    assert begun == [0, 16] and [file.name for file in tmp_path.iterdir()] == ["samples.npz"]
    for one, other in zip(x, network.draw(key, 20), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_two_processes_killed_at_any_moment_end_bit_equal_to_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}

    def start(name, *more):
        command = [sys.executable, "-m", "tests.smollm2.tiny_order", tmp_path / name, tmp_path / "cache", *more]
        return subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ended(process) -> str:
        said, told = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), told
        return said

    begin = time.monotonic()
    assert "all done" in ended(start("whole"))
    length = time.monotonic() - begin
    chance = random.Random(0)
    for _ in range(5):
        # The first run also compiled: a sixteenth of it is a moment of a later one, however fast the machine.
        for killed in [start("killed", chance.uniform(0, length / 16)) for _ in range(2)]:
            assert "all done" not in ended(killed)
    made = [ended(last).splitlines() for last in [start("killed") for _ in range(2)]]
    assert all("all done" in lines for lines in made)
    _assert_same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_stages_interrupted_at_any_step_end_bit_equal_and_compile_once(tmp_path, monkeypatch):
    """A critic's optimiser, a student's own draws and several devices, which the killed processes do not have."""
    tiny = tiny_order.make()
    order = tiny_order.make(
        algorithms=("ppo",),
        arms=("kd_align",),
        alignment=replace(tiny.alignment, settings=align.AlignmentSettings("ppo", 12, 8, epochs=2)),
        distillation=replace(tiny.distillation, method="reverse_kl", on_policy_fraction=0.5),
    )
    with monkeypatch.context() as patched:
        programs = _programs_after_each_step(patched)
        tiny_order.run(order, tmp_path / "whole", meshed=True)
    assert [len(of_stage) for of_stage in programs] == [6, 6]
    assert all(len(set(of_stage)) == 1 for of_stage in programs)

    write, chance, left = durable.Log.write, random.Random(0), 0

    def interrupted(log, step, metrics):
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        write(log, step, metrics)
        if left == 1 and chance.random() < 0.5:
            raise KeyboardInterrupt

    monkeypatch.setattr(durable.Log, "write", interrupted)
    interruptions = 0
    while True:
        # Each time one checkpoint further, at least.
        left = chance.randint(4, 6)
        try:
            tiny_order.run(order, tmp_path / "interrupted", meshed=True)
        except KeyboardInterrupt:
            interruptions += 1
        else:
            break
    assert interruptions >= 3
    _assert_same(tmp_path / "whole", tmp_path / "interrupted")


def _programs_after_each_step(monkeypatch) -> list[list[tuple[int, ...]]]:
    """Of each stage that is made from now on: numbers of programs of its step, of drawing (two) and of scoring."""
    stages_seen = []

    def watched(make):
        # Steps of its own: those of other tests may be compiled for what comes only later here.
        make = lru_cache(make.__wrapped__)

        def maker(*arguments):
            step, seen = make(*arguments), []
            stages_seen.append(seen)

            def one_step(*inputs):
                made = step(*inputs)
                programs = (step, generate._laid_out, generate._generate, network._log_prob)
                seen.append(tuple(program._cache_size() for program in programs))
                return made

            return one_step

        return maker

    for name in ("_sequence_step", "_token_step", "_alignment_step"):
        monkeypatch.setattr(stages, name, watched(getattr(stages, name)))
    return stages_seen


def _files(folder: Path) -> list[Path]:
    """All files, but the claims that processes had."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.mark.slow
def test_what_diverges_is_told_and_the_rest_is_made(tmp_path):
    wild = replace(tiny_order.OPTIMISATION, learning_rate=1e38, max_gradient_norm=1e30)
    order = tiny_order.make(alignment=replace(tiny_order.make().alignment, optimisation=wild))
    out = tmp_path / "run"
    tiny_order.run(order, out)
    run = report.read(order, out)
    assert {path.relative_to(out).name for path in report.failures(run)} == {
        "aligned_base-b0.1",
        "kd_align-t0.6-b0.1",
    }
    failed = {row["arm"]: (row["seeds"], row["failed_seeds"]) for row in report.table(run)}
    assert failed == dict.fromkeys(("base", "student"), (1, "")) | dict.fromkeys(
        ("aligned_base", "kd_align", "align_kd"), (0, "0")
    )
    assert sum("the alignment diverged" in line for line in report.sentences(run)) == 2
    order_figure.draw(run, tmp_path / "figure.png")


def _assert_same(one: Path, other: Path) -> None:
    files = [path.relative_to(one) for path in _files(one)]
    assert files == [path.relative_to(other) for path in _files(other)]
    for file in files:
        first, second = one / file, other / file
        if file.suffix in (".json", ".jsonl"):
            assert _without_times(first) == _without_times(second), file
        elif file.suffix == ".npz":
            with np.load(first) as a, np.load(second) as b:
                assert all(np.array_equal(a[name], b[name]) for name in a), file
        else:
            assert first.read_bytes() == second.read_bytes(), file


def _without_times(path: Path):
    def clean(value):
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items() if "seconds" not in k and k != "cost"}
        return value

    return (
        [clean(json.loads(line)) for line in path.read_text().splitlines()]
        if path.suffix == ".jsonl"
        else clean(json.loads(path.read_text()))
    )


def test_the_default_order_is_valid():
    assert Order("random:tiny").arms


@pytest.mark.slow
def test_a_base_is_fitted_and_only_a_cut_student_needs_admission(tmp_path):
    out = tmp_path / "run"
    order = tiny_order.make(base="fit:random:tiny", students=("layers:2",), arms=("kd_align",))
    laboratory = tiny_order.run(order, out)
    assert laboratory.base is not laboratory.truth and durable.read_record(out / "base") is not None
    row = rows_of(order, out)[-1]
    assert row.name == "kd_align" and laboratory._admitted(row)
    path = next(out.rglob("student-t0.6")) / "evaluation.json"
    durable.write_json(path, json.loads(path.read_text()) | {"recall_gap_per_token": 0.6})
    assert not laboratory._admitted(row)
    assert laboratory._admitted(replace(row, student="a/checkpoint"))


def test_refuses_fewer_samples_than_a_batch():
    import jax

    with pytest.raises(ValueError, match="0 samples, those held out left aside, fill no batch of 8"):
        stages._batches(jax.random.key(0), 0, 8)
