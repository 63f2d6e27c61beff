"""The benchmark of SmolLM2 as it is run, on a tiny model: both sides in processes of their own."""

import importlib
import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).resolve().parents[2]


def test_both_sides_are_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(ROOT / "experiments")
    benchmark = importlib.import_module("benchmark_smollm2")
    monkeypatch.setattr(benchmark, "PRODUCT", 64)
    path = tmp_path / "a.json"
    benchmark.main(
        benchmark.Benchmark(
            source="random:tiny",
            only=("forward", "gradient", "decode"),
            batch=2,
            length=9,
            memory=False,
            decode_batches=(1, 2),
            torch_decode_batches=(1,),
            new_tokens=4,
            repetitions=1,
            json_file=path,
        )
    )
    result = json.loads(path.read_text(encoding="utf-8"))
    assert json.loads(capsys.readouterr().out) == result and path.with_suffix(".png").is_file()
    timed = {row["name"]: row for row in result["tasks"] if "seconds" in row}
    float32 = {"torch", "torch medium"}
    assert {name: set(row.get("times_faster_than", ())) for name, row in timed.items()} == {
        "forward float32 2x9": float32,
        "gradient float32 2x9": float32,
        "decode float32 1x4": float32,
        "decode float32 2x4": set(),
        "forward bfloat16 2x9": {"torch"},
        "gradient bfloat16 2x9": {"torch"},
    }
    assert all(row["seconds"]["jaxkd"] > 0 < row["share_of_product"] for row in timed.values())
