"""align.py, distill.py and smollm2_order.py as they are called."""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxkd import durable
from jaxkd.smollm2 import stages, students, tokenization, weights
from jaxkd.smollm2.laboratory import BEHAVIOUR
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.network import Network
from jaxkd.sweep import cache
from tests.smollm2 import by_hand, tiny_order

pytestmark = pytest.mark.loose
EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
ALIGN, DISTILL, ORDER = (EXPERIMENTS / f"{name}.py" for name in ("align", "distill", "smollm2_order"))
SMALL = ["--updates", "4", "--batch-size", "8", "--learning-rate", "1e-3"]


@pytest.fixture(autouse=True)
def no_compile_cache(monkeypatch):
    monkeypatch.setattr(cache, "use_compile_cache", lambda *arguments: None)


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _moved(folder):
    """Whether a checkpoint has other weights than the source."""
    _, before = weights.load("random:tiny")
    _, after = weights.load(folder)
    return not all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True))


def test_align_on_preferences_writes_a_checkpoint(run, pairs, tmp_path):
    arguments = ["--source", "random:tiny", "--preferences", pairs, *SMALL, "--out", tmp_path / "out"]
    code, _, errors = run(ALIGN, *arguments)
    assert code == 0, errors
    assert _moved(tmp_path / "out" / "model")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-4) and losses[-1] < losses[0]
    code, _, errors = run(ALIGN, *arguments)
    assert code == 0 and "is finished" in errors
    code, _, errors = run(ALIGN, *arguments, "--kl-coef", "0.2")
    assert code == 2 and "kl_coef: 0.1 there, 0.2 now" in errors


def _shown(out):
    """What each token is part of, and its text."""
    return [line.split()[2:] for line in out.splitlines() if line.split()[0].isdecimal()]


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *_, **__: pytest.fail("the weights are not needed for this"))


def test_a_pair_is_shown_before_weights_are_read(run, pairs, no_weights, tmp_path):
    pairs.write_text(pairs.read_text().replace("Say 0", "a").replace(" yes 0", "bc").replace(" no 0", "d"))
    arguments = ["--source", "random:tiny", "--preferences", pairs, *SMALL, "--out", tmp_path / "out"]
    code, out, errors = run(ALIGN, *arguments, "--show-example")
    assert code == 0, errors
    asked, end = ["prompt", "'a'"], ["completion", "'<|im_end|>'"]
    chosen, rejected = (_shown(part) for part in out.removeprefix("chosen\n").split("rejected\n"))
    assert chosen[:4] == [asked, ["completion", "'b'"], ["completion", "'c'"], end]
    assert rejected[:3] == [asked, ["completion", "'d'"], end]
    assert not (tmp_path / "out").exists()


def test_the_first_text_is_shown_before_weights_are_read(run, no_weights, tmp_path):
    path = tmp_path / "texts.jsonl"
    rows = [{"prompt": "a", "completion": chr(ord("b") + i)} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--teacher", "random:tiny", "--data", path, "--held-out", "8", *SMALL, "--out", tmp_path / "out"]
    code, out, errors = run(DISTILL, *arguments, "--show-example")
    assert code == 0, errors
    assert _shown(out) == [["prompt", "'a'"], ["completion", "'b'"], ["completion", "'<|im_end|>'"]]
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_whether_or_not_its_texts_were_looked_at(pairs, tmp_path):
    for script, kind, arguments in (
        (ALIGN, "Align", {"source": "random:tiny", "preferences": pairs}),
        (DISTILL, "Distill", {"teacher": "random:tiny", "data": pairs}),
    ):
        made = runpy.run_path(str(script))[kind]
        one, other = (made(out=tmp_path, show_example=shown, **arguments) for shown in (False, True))
        assert one.results_depend_on() == other.results_depend_on()
        assert "show_example" not in one.results_depend_on()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [["ppo"], ["reinforce", "--lora-rank", "2"]])
def test_align_on_a_behaviour(run, tmp_path, algorithm):
    code, _, errors = run(
        ALIGN, "--source", "random:tiny", "--behaviour", "digit", "--max-new-tokens", "8", *SMALL,
        "--algorithm", *algorithm, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, errors
    assert _moved(tmp_path / "out" / "model")


def test_robust_dpo_assumes_the_share_that_is_given(run, pairs, monkeypatch, tmp_path):
    def stop(*arguments, **more):
        raise ValueError(f"assumed: {arguments[6].coefficients.label_smoothing}")

    monkeypatch.setattr(stages, "align_policy", stop)
    zeros = lambda self, x, first: iter([np.zeros((16, x.tokens.shape[1] - 1), np.float32)])  # noqa: E731
    monkeypatch.setattr(Network, "scored", zeros)
    code, _, errors = run(
        ALIGN, "--source", "random:tiny", "--preferences", pairs, "--algorithm", "robust_dpo", "--label-noise", "0.2",
        *SMALL, "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 2 and "assumed: 0.2" in errors


def test_align_refuses_other_weights_of_its_target(run, monkeypatch, tmp_path):
    def stop(*arguments, **more):
        raise ValueError("this far")

    monkeypatch.setattr(stages, "align_policy", stop)
    config, params = weights.load("random:tiny")
    arguments = ["--source", "random:tiny", "--target", tmp_path / "target", *SMALL, "--out", tmp_path / "out"]
    for saved, told in ((params, "this far"), (tiny_order.uneven(params), "are others now (target")):
        weights.save_pretrained(tmp_path / "target", config, saved, tokenization.byte_tokenizer())
        code, _, errors = run(ALIGN, *arguments)
        assert code == 2 and told in errors


def test_align_reflects_the_likelihood_under_a_target(run, tmp_path):
    config, params = weights.load("random:tiny")
    weights.save_pretrained(tmp_path / "target", config, tiny_order.uneven(params), tokenization.byte_tokenizer())
    out = tmp_path / "out"
    code, _, errors = run(
        ALIGN, "--source", "random:tiny", "--target", tmp_path / "target", "--reward", "reflected",
        "--algorithm", "online_dpo", "--label-temperature", "0.5", *SMALL, "--out", out,
    )  # fmt: skip
    assert code == 0, errors
    level = json.loads((out / "level.json").read_text())["level"]
    rewards = [json.loads(line)["reward"] for line in (out / durable.METRICS).read_text().splitlines()]
    # Reflected at the target's mean, no reward is above it.
    assert rewards and max(rewards) < level < 0
    held = json.loads((out / "config.json").read_text())
    assert (held["reward"], held["label_temperature"]) == ("reflected", 0.5) and "label_noise" not in held


def test_a_users_pairs_are_not_flipped_whatever_else_learns_from_them():
    """The share is robust DPO's alone: KTO beside it takes no labels."""
    flags = {"preferences": "x", "algorithms": ("robust_dpo", "kto"), "label_noise": 0.1}
    order = runpy.run_path(str(ORDER))["order_of"](runpy.run_path(str(ORDER))["Flags"](**flags))
    assert order.alignment.coefficients.flip_rate == 0.1


def test_texts_of_a_file_are_held_out_at_random(tmp_path):
    """Whatever their order there: sample.py writes all completions of a prompt one after another."""
    script, path = runpy.run_path(str(DISTILL)), tmp_path / "texts.jsonl"
    rows = [{"prompt": prompt, "completion": f" {i}"} for prompt in ("One", "Two") for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer, found = tokenization.byte_tokenizer(), []
    for seed in (0, 1, 1):
        config = script["Distill"]("random:tiny", tmp_path, data=path, held_out=16, batch_size=8, seed=seed)
        read = script["shuffled"](config, script["read_texts"](config, tokenizer))
        rows_of = zip(read.tokens, read.mask, strict=True)
        found.append([tokenizer.decode(row[kept].tolist(), skip_special_tokens=True) for row, kept in rows_of])
    whole = [row["prompt"] + row["completion"] for row in rows]
    assert all(sorted(texts) == sorted(whole) for texts in found)
    assert found[0] != found[1] == found[2]
    for texts in found:
        assert {one[:3] for one in texts[:16]} == {"One", "Two"}


@pytest.mark.slow
def test_distill_writes_a_student(run, tmp_path):
    fresh, params = weights.load("random:tiny")
    weights.save_pretrained(tmp_path / "teacher", fresh, tiny_order.uneven(params), tokenization.byte_tokenizer())
    code, _, errors = run(
        DISTILL, "--teacher", tmp_path / "teacher", "--student", "layers:2", "--samples", "16", "--held-out", "8",
        "--max-new-tokens", "8", "--check-every", "2", *SMALL, "--updates", "8", "--method", "reverse_kl",
        "--on-policy-fraction", "0.5", "--out", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, errors
    config, params = weights.load(tmp_path / "out" / "model")
    assert config.num_layers == 2
    with np.load(tmp_path / "out" / "teacher.npz") as file:
        held_out = {name: file[name][:8] for name in file}
    begun = students.keep_layers(*weights.load(tmp_path / "teacher"), 2)
    assert by_hand.log_prob(config, params, held_out).mean() > by_hand.log_prob(*begun, held_out).mean()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (ALIGN, ["--source", "random:tiny"], "give one of --preferences"),
        (
            ALIGN,
            ["--source", "random:tiny", "--behaviour", "digit", "--show-example"],
            "--show-example shows a pair of --preferences",
        ),
        (DISTILL, ["--teacher", "random:tiny", "--show-example"], "--show-example shows a text of --data"),
        (
            ALIGN,
            ["--source", "random:tiny", "--behaviour", "digit", "--algorithm", "dpo"],
            "--algorithm must be one of reinforce, ppo, grpo, online_dpo, offline_dpo_ref; got 'dpo'",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--behaviour", "digit", "--algorithm", "ppo", "--updates", "6"],
            "--updates must be a multiple of 4",
        ),
        (ALIGN, ["--source", "random:tiny", "--behaviour", "digit", "--lora-rank", "999"], "rank must be at most"),
        (DISTILL, ["--teacher", "random:tiny", "--student", "layers:9"], "the number of layers kept"),
        (DISTILL, ["--teacher", "random:tiny", "--student", "layers:0,9"], "a layer kept must be"),
        (ORDER, ["--truth", "random:tiny", "--student", "layers:9"], "layers of the base in 'layers:9'"),
        (ORDER, ["--truth", "random:tiny", "--student", "layers:0,9"], "the last layer in 'layers:0,9'"),
        (ALIGN, ["--source", "random:tiny", "--behaviour", "often", "--algorithm", "ppo"], "a behaviour must be"),
        (ALIGN, ["--source", "random:tiny", "--preferences", "absent.jsonl"], "there is no file absent.jsonl"),
        (
            ALIGN,
            [
                *("--source", "random:tiny", "--behaviour", "words:unlikelihood", "--algorithm", "ppo"),
                *("--batch-size", "256", "--max-new-tokens", "8"),  # few and short passes until that is known
            ],
            "never shown",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--behaviour", "digit", "--algorithm", "ppo", "--lora-rank", "2"],
            "ppo trains a critic",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--behaviour", "digit", "--algorithm", "ppo", "--accumulate", "2"],
            "ppo makes several updates a rollout",
        ),
        (DISTILL, ["--teacher", "random:tiny", "--prompt", ""], "the prompt must have at least one token; got ''"),
        (DISTILL, ["--teacher", "random:tiny", "--max-new-tokens", "500"], "500 new ones are more than the 128 pos"),
        (
            DISTILL,
            ["--teacher", "random:tiny", "--method", "forward_kl", "--data", "x", "--on-policy-fraction", "0.5"],
            "--on-policy-fraction draws after --prompt",
        ),
        (DISTILL, ["--teacher", "random:tiny", "--method", "kl"], "method must be one of sequence"),
        (
            DISTILL,
            ["--teacher", "random:tiny", "--method", "forward_kl", "--on-policy-fraction", "1.5"],
            "on_policy_fraction must be",
        ),
        *(
            (DISTILL, ["--teacher", "random:tiny", "--method", method, "--coefficient", at], told)
            for method, at, told in (
                ("generalized_jensen_shannon", "0", "coefficient must lie between 0 and 1: at 0"),
                ("generalized_jensen_shannon", "1", "coefficient must lie between 0 and 1: at 1"),
                ("skew_kl", "1", "coefficient must be below 1"),
            )
        ),
        (ALIGN, ["--source", "random:tiny", "--behaviour", "digit", "--reward", "clipped"], "--reward is a likelihood"),
        (
            ALIGN,
            ["--source", "random:tiny", "--target", "random:tiny", "--reward", "log"],
            "--reward must be one of plain",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--behaviour", "digit", "--label-temperature", "0.5"],
            "--label-temperature is for what learns from preference labels, not for reinforce",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--preferences", "x", "--label-temperature", "0.5"],
            "--label-temperature is that of a reward's labels",
        ),
        (
            ORDER,
            ["--truth", "random:tiny", "--algorithms", "online_dpo", "--label-temperature", "0"],
            "--label-temperature must be",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--preferences", "x", "--algorithm", "robust_dpo"],
            "robust_dpo needs --label-noise",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--preferences", "x", "--algorithm", "robust_dpo", "--label-noise", "0.5"],
            "--label-noise must be below 0.5 for robust_dpo",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--preferences", "x", "--algorithm", "ipo", "--label-noise", "0.1"],
            "only robust_dpo assumes a share of wrong labels; got 0.1 for ipo",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--behaviour", "digit", "--label-noise", "0.1"],
            "--label-noise must be 0 for reinforce",
        ),
        (
            ORDER,
            ["--truth", "random:tiny", "--preferences", "x", "--algorithms", "ipo", "robust_dpo"],
            "robust_dpo needs --label-noise",
        ),
        (ORDER, ["--truth", "random:tiny", "--label-noise", "0.1"], "--label-noise must be 0 for reinforce"),
        (
            ALIGN,
            ["--source", "random:tiny", "--preferences", "x", "--algorithm", "orpo", "--kl-coef", "0.2"],
            "--kl-coef must be left away: orpo has no KL coefficient",
        ),
        (
            ALIGN,
            ["--source", "random:tiny", "--preferences", "x", "--algorithm", "simpo", "--reference", "random:tiny"],
            "--reference must be left away: simpo has no reference",
        ),
        (
            DISTILL,
            ["--teacher", "random:tiny", "--data", "x", "--samples", "8", "--temperature", "0.5", "--prompt", "A"],
            "--samples, --temperature, --prompt must be left away with --data",
        ),
        (
            DISTILL,
            ["--teacher", "random:tiny", "--data", "x", "--method", "skew_kl", "--temperature", "0.5"],
            "there is no file x",
        ),
        (
            ORDER,
            ["--truth", "random:tiny", "--preferences", "x", "--algorithms", "orpo", "--kl-coefs", "0.1", "0.2"],
            "orpo has no KL coefficient",
        ),
        (ORDER, ["--preset", "papers"], "--preset must be one of laptop, paper"),
        (
            ORDER,
            ["--truth", "random:tiny", "--student", "same", "--max-new-tokens", "9000"],
            "and 9000 new ones are asked for; the context of the model is 128 tokens",
        ),
        (ORDER, ["--truth", "random:tiny", "--arms", "kd"], "arms must be one of"),
        (
            ORDER,
            ["--truth", "random:tiny", "--quick", "--algorithms", "reinforce", "ppo"],
            "--alignment-updates must be a multiple of 4, as ppo makes so many a rollout; got 2",
        ),
        (
            ORDER,
            ["--truth", "random:tiny", "--algorithms", "grpo", "--alignment-updates", "6"],
            "--alignment-updates must be a multiple of 4, as grpo makes so many a rollout; got 6",
        ),
        (
            ORDER,
            ["--truth", "random:tiny", "--alignment-batch-size", "2"],
            "--alignment-batch-size must be a whole number of at least 4; got 2",
        ),
        (
            ORDER,
            ["--truth", "random:tiny", "--alignment-batch-size", "7"],
            "--alignment-batch-size must be even; got 7",
        ),
        (ORDER, ["--truth", "no/such"], "no/such"),
        (ORDER, ["--truth", "random:tiny", "--report"], "holds no run that has begun to measure"),
        (
            ORDER,
            ["--truth", "random:tiny", "--reward", "plain", "--target", "random:tiny", "--arms", "ceiling"],
            "the ceiling learns from texts that show the behaviour",
        ),
        # The preset's own ceiling is left away.
        (
            ORDER,
            ["--truth", "random:tiny", "--student", "same", "--reward", "plain", "--target", "no/such"],
            "no/such",
        ),
        (
            ORDER,
            ["--truth", "random:tiny", "--student", "same", "--preferences", "absent.jsonl", "--algorithms", "ipo"],
            "there is no file absent.jsonl",
        ),
    ],
)
def test_refuses(run, tmp_path, monkeypatch, script, arguments, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, errors = run(script, *arguments, "--out", tmp_path / "out")
    told = " ".join((out + errors).split())
    assert code == 2 and message in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (
            ALIGN,
            ["--source", "random:tiny"],
            "a batch holds 8 pairs; the preferences have 7 to learn from: choose a smaller --batch-size",
        ),
        (
            ORDER,
            ["--truth", "random:tiny", "--quick", "--algorithms", "ipo", "--batch-size", "4"],
            "a batch holds 8 pairs; the preferences have 6 to learn from: choose a smaller --alignment-batch-size",
        ),
    ],
)
def test_too_few_pairs_are_told_with_the_flag_that_asks_for_fewer(run, tmp_path, script, arguments, message):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"Say {i}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(7)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, errors = run(script, *arguments, "--preferences", path, "--out", tmp_path / "out")
    assert code == 2 and message in errors
    assert not (tmp_path / "out").exists()


def _one_message(errors: str) -> str:
    """What a script ended with, and nothing besides."""
    [line] = errors.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (ALIGN, ["--source", "random:tiny"]),
        (ORDER, ["--quick", "--truth", "random:tiny", "--reward", "plain"]),
    ],
)
def test_a_target_of_another_vocabulary_is_refused(run, tmp_path, script, arguments):
    """Though it has as many tokens."""
    target, out = tmp_path / "target", tmp_path / "out"
    weights.save_pretrained(target, *weights.load("random:tiny"), tokenization.byte_tokenizer())
    path = target / "tokenizer.json"
    backend = json.loads(path.read_text(encoding="utf-8"))
    ids = backend["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    path.write_text(json.dumps(backend), encoding="utf-8")
    code, _, errors = run(script, *arguments, "--target", target, "--out", out)
    assert code == 2 and "the two vocabularies differ (259 and 259 tokens)" in _one_message(errors)
    assert not out.exists()


def test_a_target_with_more_tokens_than_the_truth_is_refused(run, tmp_path):
    target, out = tmp_path / "target", tmp_path / "out"
    config = replace(weights.load_config("random:tiny"), vocab_size=272)
    params = make_model(config).init(jax.random.key(0))
    weights.save_pretrained(target, config, params, tokenization.byte_tokenizer())
    arguments = ["--quick", "--truth", "random:tiny", "--reward", "plain", "--target", target, "--out", out]
    code, _, errors = run(ORDER, *arguments)
    assert code == 2 and "has a vocabulary of 272 tokens, the truth random:tiny one of 264" in _one_message(errors)
    assert not out.exists()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Say", "completion": " yes"}, "row 9 has no chosen: preferences need chosen and rejected"),
        ({"prompt": "Say", "chosen": " yes"}, "row 9: a row must have the columns of one format"),
        ({"text": "Say yes"}, "row 9: a row must have the columns of one format"),
        ({"prompt": "Say", "chosen": "", "rejected": " no"}, "row 9: chosen is empty"),
        ({"prompt": "Say", "chosen": " yes", "rejected": "  "}, "row 9: rejected is empty"),
    ],
)
def test_the_order_refuses_a_row_that_is_no_pair(run, pairs, tmp_path, row, message):
    with pairs.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    arguments = ["--quick", "--truth", "random:tiny", "--algorithms", "ipo", "--alignment-batch-size", "4"]
    code, _, errors = run(ORDER, *arguments, "--preferences", pairs, "--out", tmp_path / "out")
    assert code == 2 and f"{pairs}, {message}" in _one_message(errors)
    assert not (tmp_path / "out").exists()


def test_the_order_refuses_a_behaviour_that_is_always_shown(run, tmp_path):
    """Once the truth is sampled; another may be asked for in the same folder."""
    arguments = ["--quick", "--truth", "random:tiny", "--max-new-tokens", "8", "--samples", "16"]
    code, _, errors = run(ORDER, *arguments, "--behaviour", "regex:^", "--out", tmp_path / "out")
    assert code == 2
    told = "error: the behaviour 'regex:^' is always shown by 16 samples of the base: choose another (--behaviour)"
    assert errors.splitlines()[-1] == told
    assert not (tmp_path / "out" / BEHAVIOUR).exists()
