"""The scripts as they are called, in this process: bad input is one message and exit code 2, and writes nothing."""

from pathlib import Path

import pytest

from jaxkd.sweep import engine

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("mog_order", "--temperatures", "--temperatures must name at least one value"),
        ("mog_order", "--kl-coefs nan", "--kl-coefs must be a finite number"),
        ("mog_order", "--target-weight 1", "--target-weight must be"),
        ("mog_order", "--capacity 9", "--capacity must be"),
        ("mog_order", "--algorithms orpo", "--algorithms must be one of"),
        ("phase_diagram", "--capacities", "--capacities must name at least one value"),
        ("phase_diagram", "--capacities 9", "--capacities must be a whole number"),
        ("phase_diagram", "--kl-coefs 1 1", "--kl-coefs names a value twice"),
        ("phase_diagram", "--chunk 0", "--chunk must be a whole number"),
        ("phase_diagram", "--preset planes", "--preset must be one of"),
        ("phase_diagram", "--axis 1", "Unrecognized options: --axis"),
        ("replot", "nowhere", "STORE must be a folder that holds sweep.zarr or mog_order.zarr; got nowhere"),
        ("tune_learning_rate", "--algorithms grpo", "--algorithms must be one of reinforce, ppo, online_dpo"),
        ("tune_learning_rate", "--learning-rates 0.1 0", "--learning-rates must be a finite number above 0"),
        ("tune_learning_rate", "--seeds 0", "--seeds must be a whole number of at least 1"),
        ("tune_learning_rate", "--out gs://bucket", "--out must be a folder"),
        ("benchmark_sweep", "--chunks 4 4", "--chunks names a value twice"),
        ("benchmark_smollm2", "--repetitions 0", "--repetitions must be a whole number of at least 1"),
        ("benchmark_smollm2", "--length 8", "--length must be a whole number of at least 9"),
        ("benchmark_smollm2", "--decode-batches", "--decode-batches must name at least one value"),
        ("benchmark_smollm2", "--only backward", "--only must be one of forward, gradient, decode, dpo, distillation"),
    ],
)
def test_bad_input_is_one_message(run, tmp_path, monkeypatch, script, arguments, message):
    # Scripts import one another; the number of devices is fixed once jax has started.
    monkeypatch.syspath_prepend(EXPERIMENTS)
    monkeypatch.setattr(engine, "use_cpu_cores_as_devices", lambda: None)
    monkeypatch.chdir(tmp_path)
    code, out, err = run(EXPERIMENTS / f"{script}.py", *arguments.split())
    assert code == 2
    # tyro draws a box around its message and breaks lines.
    assert message in " ".join(err.replace("│", " ").split())
    assert "Traceback" not in out + err
    assert not list(tmp_path.iterdir())
