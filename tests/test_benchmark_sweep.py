"""The throughput benchmark: what it makes of timings, what it measures in which order, what it refuses."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import align, metrics, mixture, mixture_rewards, throughput

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.fixture
def script(monkeypatch):
    """Import a script of experiments/ as a module."""
    monkeypatch.syspath_prepend(EXPERIMENTS)
    return importlib.import_module


@pytest.fixture
def tiny(script):
    """Sizes that compute next to nothing."""
    return script("reference_workload").Workload(components=2, points=64, iterations=2, steps=2, samples=8, grid=31)


def row(milliseconds, runs=10, **more):
    return {"runs": runs, "seconds": [runs * each / 1e3 for each in milliseconds], **more}


@pytest.fixture
def results():
    """Timings with known medians: 5 ms a run at best, a loop of 20 and PyTorch of 300."""
    return {
        "engine": [
            row([8.0, 9.0, 70.0], devices=1, chunk=4, compile_s=1.0),
            row([4.0, 5.0, 90.0], devices=2, chunk=4, compile_s=2.0),
            row([1.0, 7.0, 8.0], devices=2, chunk=16, compile_s=3.0),
        ],
        "loop": row([20.0, 20.0, 50.0], compile_s=1.5),
        "torch": row([250.0, 300.0, 310.0], processes=2, version="0"),
        "growth": {
            "runs": [row([1.0], runs, size=runs) for runs in (4, 8, 16, 32)],
            "steps": [row([ms], size=size) for size, ms in ((50, 10.0), (100, 10.0 * 2**0.5), (200, 20.0))],
        },
    }


# --- what is made of timings -----------------------------------------------------------------------------------------


def test_the_median_decides_which_row_is_best(results):
    assert throughput.best(results)["chunk"] == 4
    assert throughput.best(results)["devices"] == 2
    assert throughput.milliseconds_a_run(throughput.best(results)) == pytest.approx(5.0)
    assert throughput.smallest_milliseconds_a_run(results["engine"][2]) == pytest.approx(1.0)


def test_ratios_are_of_the_best_row(results):
    assert throughput.ratios(results) == pytest.approx({"loop": 4.0, "torch": 60.0})


def test_ratios_without_torch_name_the_loop_alone(results):
    assert throughput.ratios({**results, "torch": None}) == pytest.approx({"loop": 4.0})


def test_slopes_are_those_of_power_laws(results):
    assert throughput.slope([1, 2, 4, 8], [3.0 * n**0.7 for n in (1, 2, 4, 8)]) == pytest.approx(0.7)
    assert throughput.growth_slope(results["growth"]["runs"]) == pytest.approx(1.0)
    assert throughput.growth_slope(results["growth"]["steps"]) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two different sizes"):
        throughput.slope([3, 3], [1.0, 2.0])


def test_the_table_has_a_line_for_every_form_and_axis(results):
    lines = throughput.table(results).splitlines()
    assert [line.split()[-5:] for line in lines if line.startswith("jaxkd, 2 devices")] == [
        ["4", "2.0", "5.00", "4.00", "200.0"],
        ["16", "3.0", "7.00", "1.00", "142.9"],
    ]
    assert sum("PyTorch" in line for line in lines) == 1
    assert [line.split()[-1] for line in lines if line.startswith(("runs", "steps"))] == ["1.00", "0.50"]
    assert "PyTorch" not in throughput.table({**results, "torch": None})


def test_the_figure_is_drawn_from_the_json_alone(results, tmp_path):
    paths = [tmp_path / name for name in ("a.png", "a.pdf", "b.png")]
    held = json.loads(json.dumps(results))
    throughput.draw(held, *paths[:2])
    throughput.draw({**held, "torch": None, "growth": {}}, paths[2])
    assert paths[0].read_bytes()[:4] == b"\x89PNG"
    assert paths[1].read_bytes()[:4] == b"%PDF"
    assert paths[0].read_bytes() != paths[2].read_bytes()


# --- what is measured ------------------------------------------------------------------------------------------------


def test_every_axis_grows_by_a_factor_of_eight_up_to_the_reference(script):
    reference = script("reference_workload").Workload()
    growth = script("benchmark_sweep").growth_workloads(reference)
    assert {axis: [size for size, _ in sizes] for axis, sizes in growth.items()} == {
        "steps": [50, 100, 200, 400],
        "samples": [32, 64, 128, 256],
        "components": [1, 2, 4, 8],
    }
    assert all(sizes[-1][1] == reference for sizes in growth.values())
    assert [workload.points for _, workload in growth["samples"]] == [256, 512, 1024, 2048]
    assert {workload.samples for _, workload in growth["steps"]} == {256}


def test_forms_take_turns_and_the_first_call_does_not_count(script):
    bench = script("benchmark_sweep")
    calls = []
    forms = [bench.Form(lambda name=name: calls.append(name), 3, {"name": name}) for name in "ab"]
    bench.repeat_in_turn(forms, 3, lambda _: None)
    assert "".join(calls) == "ab" * 4
    assert [len(form.result()["seconds"]) for form in forms] == [3, 3]


def test_the_loop_and_the_engine_make_the_same_runs(script, tiny, monkeypatch):
    bench, made = script("benchmark_sweep"), []

    def run_of(workload):
        def run(key, truth, grid):
            told = (*jax.random.key_data(key), truth.modes.means.sum(), grid.cell)
            jax.debug.callback(lambda *numbers: made.append(tuple(map(float, numbers))), *told)
            return jax.random.key_data(key)

        return run

    monkeypatch.setattr(bench, "run_of", run_of)
    runs = []
    for form in (bench.engine_form(tiny, runs=3, chunk=2, devices=2), bench.loop_form(tiny, runs=3)):
        assert form.runs == 3
        form.call()
        jax.effects_barrier()
        runs.append(set(made))
        made.clear()
    assert runs[0] == runs[1] and len(runs[0]) == 3


@pytest.mark.loose
def test_a_run_ends_in_the_metrics_of_five_models(script, tiny):
    workloads = script("reference_workload")
    found = jax.eval_shape(workloads.run_of(tiny), jax.random.key(0), *workloads.make_problem(tiny))
    assert isinstance(found, metrics.Metrics)
    assert all(leaf.shape[0] == 5 for leaf in found)


def test_a_benchmark_ends_in_json_figure_and_ratios(script, tiny, tmp_path, capsys, monkeypatch):
    bench = script("benchmark_sweep")
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    # What is timed does not matter here, and it takes seconds to compile.
    monkeypatch.setattr(bench, "run_of", lambda workload: lambda key, truth, grid: jax.random.uniform(key, (5,)))
    settings = bench.Benchmark(
        runs=4, chunks=(1, 2), devices=(2,), loop_runs=2, repetitions=2, growth=False, workload=tiny, out=tmp_path / "o"
    )
    bench.main(settings)
    told, progress = capsys.readouterr()
    steps = bench.count_steps(settings, (2,))
    assert f"{steps}/{steps}" in progress.splitlines()[-1]
    assert "PyTorch is not installed" in told
    assert "times the runs a second of the jitted loop" in told
    assert sorted(path.name for path in (tmp_path / "o").iterdir()) == [
        "benchmark_sweep.json", "throughput.pdf", "throughput.png",
    ]  # fmt: skip
    written = json.loads((tmp_path / "o" / "benchmark_sweep.json").read_text())
    assert [(each["devices"], each["chunk"], len(each["seconds"])) for each in written["engine"]] == [
        (2, 1, 2),
        (2, 2, 2),
    ]
    assert written["torch"] is None
    assert written["ratios"] == throughput.ratios(written)
    assert json.loads(written["provenance"]["configuration"])["workload"]["points"] == 64


def test_flags_that_are_given_win_over_quick(script):
    bench = script("benchmark_sweep")
    given = {"runs": 40, "chunks": (2, 3), "loop_runs": 9, "torch_runs": 5, "repetitions": 7}
    for quick in (False, True):
        chosen = bench.Benchmark(quick=quick, **given).resolved()
        assert {name: getattr(chosen, name) for name in given} == given
    quick, whole = (bench.Benchmark(quick=quick).resolved() for quick in (True, False))
    assert (quick.runs, quick.chunks, quick.loop_runs, quick.torch_runs, quick.repetitions) == (16, (8,), 4, 1, 2)
    assert (whole.runs, whole.chunks, whole.loop_runs, whole.torch_runs, whole.repetitions) == (
        64, (1, 4, 16, 32), 8, 2, 5,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"repetitions": 0}, "--repetitions must be a whole number of at least 1"),
        ({"chunks": ()}, "--chunks must name at least one value"),
        ({"chunks": (4, 4)}, "--chunks names a value twice"),
        ({"devices": (0,)}, "--devices must be a finite number at least 1"),
        ({"torch_runs": -1}, "--torch-runs must be"),
    ],
)
def test_bad_numbers_are_refused(script, settings, told):
    with pytest.raises(ValueError, match=told):
        script("benchmark_sweep").Benchmark(**settings)


def test_sizes_too_small_to_grow_over_are_refused(script, tiny):
    with pytest.raises(ValueError, match="no-growth"):
        script("benchmark_sweep").Benchmark(workload=tiny)


def test_an_absent_device_is_one_message_and_nothing_is_written(tmp_path):
    command = [sys.executable, EXPERIMENTS / "benchmark_sweep.py", "--devices", "999", "--out", tmp_path / "o"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--devices (this process has" in ended.stderr
    assert "999" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "o").exists()


# --- the comparison is of like with like -----------------------------------------------------------------------------


@pytest.fixture
def models():
    """A policy and a reference in the plane, and draws."""
    covariances = [[[0.05, 0.02], [0.02, 0.09]], [[0.2, -0.05], [-0.05, 0.1]], [[0.03, 0.0], [0.0, 0.3]]]
    first = mixture.make([0.5, 0.3, 0.2], [[-1, 0], [1, 1], [0.2, -1]], covariances)
    second = mixture.make([0.2, 0.3, 0.5], [[-0.8, 0.1], [1.1, 0.7], [0, -0.9]], covariances)
    return first, second, mixture.sample(first, jax.random.key(1), 512)


def in_torch(model):
    import eager_torch
    import torch

    return eager_torch.Mixture(*(torch.from_numpy(np.array(leaf)) for leaf in model))


def assert_same(ours, theirs, **tolerances):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.asarray(a), b.detach().numpy(), **{"rtol": 2e-4, "atol": 2e-5} | tolerances)


@pytest.mark.parity
def test_torch_has_our_log_density_and_em_step(script, models):
    eager = script("eager_torch")
    import torch

    model, _, x = models
    points = torch.from_numpy(np.array(x))
    np.testing.assert_allclose(mixture.log_density(model, x), eager.log_density(in_torch(model), points), rtol=2e-5)
    ours = mixture.em(model, x, 1, covariance_floor=1e-4).mixture
    assert_same(ours, eager.em_step(in_torch(model), points, 1e-4))
    assert not np.allclose(ours.means, model.means, atol=1e-3)


@pytest.mark.parity
@pytest.mark.loose
def test_torch_has_our_policy_gradient_and_optimiser(script, models):
    eager = script("eager_torch")
    import torch

    start, target, x = models
    settings = align.AlignmentSettings(algorithm="reinforce", num_updates=4, batch_size=512)
    reward, nowhere = mixture_rewards.target_density(target), lambda x: jnp.zeros(x.shape[-1], bool)
    coefficients = align.Coefficients(learning_rate=0.03, kl_coef=0.7)
    points, held = torch.from_numpy(np.array(x)), in_torch(start)

    def step_with(optimizer):
        return align.make_step(mixture.policy, optimizer, settings, reward, nowhere)

    # A plain step of unit rate off a policy that has left its reference tells the gradient itself.
    moved = start._replace(means=start.means + 0.1, logits=start.logits * 1.2)
    inputs = align.Inputs(jax.random.key(0), start, coefficients._replace(learning_rate=1.0), draws=x)
    plain = optax.identity()
    stepped, _ = step_with(plain)(align.State(moved, plain.init(moved)), inputs)
    policy = eager.Mixture(*(leaf.requires_grad_() for leaf in in_torch(moved)))
    eager.policy_gradient_loss(policy, held, in_torch(target), points, 0.7).backward()
    gradients = jax.tree.map(lambda before, after: before - after, moved, stepped.params)
    assert max(float(jnp.abs(leaf).max()) for leaf in gradients) > 0.05
    assert_same(gradients, [leaf.grad for leaf in policy], rtol=1e-3, atol=1e-4)

    adam = align.make_optimizer(4)
    state = align.State(start, adam.init(start))
    inputs = inputs._replace(coefficients=coefficients)
    alignment = eager.Alignment(held, in_torch(target), {"learning_rate": 0.03, "kl_coef": 0.7, "steps": 4})
    for _ in range(4):
        state, _ = step_with(adam)(state, inputs)
        alignment.step(points)
    assert not np.allclose(state.params.means, start.means, atol=1e-2)
    assert_same(state.params, alignment.policy, rtol=2e-3, atol=1e-3)


@pytest.mark.parity
def test_torch_measures_what_we_measure(script, tiny, models, tmp_path):
    bench, eager = script("benchmark_sweep"), script("eager_torch")
    truth, grid = script("reference_workload").make_problem(bench.replace(tiny, grid=61))
    base, model, _ = models
    eager.save(tmp_path / "problem.npz", truth, grid, bench.torch_sizes(tiny))
    measured = eager.measure(eager.load(tmp_path / "problem.npz"), in_torch(base), [in_torch(model)], 0.7)[0]
    made = metrics.make_bench(
        jax.random.key(0), truth, base, mixture_rewards.target_density(truth.target), grid, num_draws=16
    )
    ours, _ = metrics.quadrature(made, model, base, 0.7)
    assert set(measured) == set(ours._fields) - {"mode_mass"}
    for name, value in measured.items():
        assert value == pytest.approx(float(getattr(ours, name)), rel=1e-3, abs=1e-5), name


@pytest.mark.parity
def test_torch_draws_and_fits_what_it_is_given(script, models, tiny):
    eager, bench = script("eager_torch"), script("benchmark_sweep")
    import torch

    model = models[0]
    generator = torch.Generator().manual_seed(0)
    x = eager.sample(in_torch(model), generator, 40_000)
    weights = np.asarray(mixture.weights(model))
    covariance = np.einsum("dek,k->de", np.asarray(mixture.covariances(model)), weights)
    centre = np.asarray(model.means) @ weights
    covariance += np.einsum("dk,ek,k->de", model.means, model.means, weights) - np.outer(centre, centre)
    np.testing.assert_allclose(x.mean(1), centre, atol=0.02)
    np.testing.assert_allclose(np.cov(x.numpy()), covariance, atol=0.02)
    sizes = {**bench.torch_sizes(tiny), "components": 3, "iterations": 60}
    gained = eager.log_density(eager.fit(generator, x[:, :4000], sizes), x).mean()
    assert float(gained) == pytest.approx(float(eager.log_density(in_torch(model), x).mean()), abs=0.02)


@pytest.mark.parity
def test_torch_processes_serve_runs(script, tiny):
    bench = script("benchmark_sweep")
    with bench.torch_form(tiny, 2, processes=2) as form:
        form.repeat()
    assert form.runs == 4
    assert len(form.result()["seconds"]) == 1
