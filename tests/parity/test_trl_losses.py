"""Our losses against TRL's: values, and gradients with respect to the parameters of a tiny random Llama.

The model is torch's. Its log-probabilities are taken here, given to our loss, and the gradient of our loss with respect
to them is sent back through torch's graph, so that the two gradients can be compared parameter by parameter.

What TRL 1.16 can be asked offline, and how:
  - DPO, robust DPO, IPO, KTO: through their trainers. The sigmoid loss of DPOTrainer has no label smoothing any more:
    conservative DPO is held against the formula that CPOTrainer keeps, given log-ratios for log-probabilities.
  - SimPO, ORPO: the loss method on a stub of its trainer. ORPOTrainer adds the likelihood of prompt and answer, and
    ours that of the answer, as the paper: only the odds-ratio term is TRL's here.
  - Leave-one-out and group-standardised advantages: what RLOOTrainer and GRPOTrainer make of the rewards they were
    given. The clipped surrogate and k3: their losses. TRL has no PPO trainer; k1 is in the reward of RLOOTrainer; k2
    is nowhere.
  - Generalized Jensen–Shannon, and the two KLs that TRL returns at its ends: a plain function. The skewed divergences
    are nowhere.
"""

import functools
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.losses import divergence, policy_gradient, preference
from tests.parity.trainers import ANSWERS, PAIRS, llama, trainer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

BETA = 0.3


def token_log_probs(model, input_ids, attention_mask):
    """Log-probability of every token but the first: [batch, steps − 1]."""
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)


def answer_log_probs(model, batch, prefix=""):
    mask = batch[prefix + "completion_mask"][:, 1:]
    per_token = token_log_probs(model, batch[prefix + "input_ids"], batch[prefix + "attention_mask"])
    return (per_token * mask).sum(1), mask.sum(1)


def assert_parity(kit, trl_loss, ours, inputs, parameters, atol=1e-6):
    """Compare a scalar loss of TRL's with ours(*inputs), and their gradients with respect to the parameters."""
    value, slopes = jax.jit(jax.value_and_grad(ours, argnums=tuple(range(len(inputs)))))(
        *(jnp.asarray(x.detach().numpy()) for x in inputs)
    )
    np.testing.assert_allclose(value, trl_loss.item(), rtol=1e-4, atol=atol)
    theirs = kit.torch.autograd.grad(trl_loss, parameters, retain_graph=True)
    through = kit.torch.autograd.grad(inputs, parameters, [kit.torch.tensor(np.asarray(slope)) for slope in slopes])
    # By the largest entry of all: small ones are sums that cancel.
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    assert largest > 1e-3
    for one, other in zip(through, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "ours"),
    [
        ("sigmoid", 0.0, lambda c, r: preference.dpo(c, r, BETA)),
        ("robust", 0.15, lambda c, r: preference.robust_dpo(c, r, BETA, 0.15)),
        ("ipo", 0.0, lambda c, r: preference.ipo(c, r, BETA)),
    ],
)
def test_paired_losses_with_a_reference(kit, tmp_path, loss_type, label_smoothing, ours):
    policy, reference = llama(kit, 0), llama(kit, 1)
    theirs = trainer(
        kit,
        "DPO",
        tmp_path,
        PAIRS,
        policy,
        ref_model=reference,
        beta=BETA,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        per_device_train_batch_size=4,
    )
    batch = next(iter(theirs.get_train_dataloader()))
    log_prob, length = answer_log_probs(policy, batch)
    log_ratio = log_prob - answer_log_probs(reference, batch)[0].detach()
    if loss_type == "ipo":
        log_ratio = log_ratio / length
    else:
        assert log_ratio.abs().max() > 1
    assert_parity(
        kit,
        theirs.compute_loss(theirs.model, batch),
        lambda c, r: ours(c, r).mean(),
        log_ratio.chunk(2),
        list(policy.parameters()),
    )


@pytest.mark.parametrize(("seeds", "floored"), [((0, 1), True), ((1, 0), False)])
def test_kto(kit, tmp_path, seeds, floored):
    policy, reference = (llama(kit, seed) for seed in seeds)
    theirs = trainer(
        kit,
        "KTO",
        tmp_path,
        ANSWERS,
        policy,
        ref_model=reference,
        beta=BETA,
        desirable_weight=1.3,
        undesirable_weight=0.8,
        per_device_train_batch_size=4,
    )
    batch = next(iter(theirs.get_train_dataloader()))
    log_ratio = answer_log_probs(policy, batch)[0] - answer_log_probs(reference, batch)[0].detach()
    # TRL's stand-in for fresh samples: the batch's answers, each after another's prompt.
    mismatched = answer_log_probs(policy, batch, "KL_")[0] - answer_log_probs(reference, batch, "KL_")[0]
    reference_point = preference.kto_reference_point(jnp.asarray(mismatched.detach().numpy()))
    assert (reference_point == 0) == floored
    desirable = batch["label"].numpy()
    assert 0 < desirable.sum() < 4
    trl_loss = theirs.compute_loss(theirs.model, batch)
    np.testing.assert_allclose(theirs._metrics["train"]["kl"][-1], reference_point, rtol=1e-4)
    assert_parity(
        kit,
        trl_loss,
        lambda x: preference.kto(x, desirable, reference_point, BETA, 1.3, 0.8).mean(),
        [log_ratio],
        list(policy.parameters()),
    )


def log_prob_leaves(kit, *shape):
    """Two sets of log-probabilities that are their own parameters."""
    values = -np.random.default_rng(3).uniform(0.05, 5, size=(2, *shape)).astype(np.float32)
    return [kit.torch.tensor(x, requires_grad=True) for x in values]


@pytest.mark.parametrize(
    ("loss_type", "label_smoothing", "ours"),
    [
        ("sigmoid", 0.2, lambda c, r: preference.cdpo(c, r, 2.0, 0.2)),
        ("simpo", 0.0, lambda c, r: preference.simpo(c, r, 2.0, 0.7)),
    ],
)
def test_losses_of_the_cpo_trainer(kit, loss_type, label_smoothing, ours):
    stub = types.SimpleNamespace(
        loss_type=loss_type,
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=label_smoothing,
        alpha=0.0,
        accelerator=types.SimpleNamespace(device="cpu"),
    )
    leaves = log_prob_leaves(kit, 16)
    losses, _, _ = kit.CPOTrainer.cpo_loss(stub, *leaves)
    np.testing.assert_allclose(ours(*(jnp.asarray(x.detach().numpy()) for x in leaves)), losses.detach(), rtol=1e-4)
    assert_parity(kit, losses.mean(), lambda c, r: ours(c, r).mean(), leaves, leaves)


def test_orpo(kit):
    stub = types.SimpleNamespace(beta=0.4, accelerator=types.SimpleNamespace(device="cpu"))
    chosen, rejected = leaves = log_prob_leaves(kit, 16)
    weighted_log_sigmoid, *_ = kit.ORPOTrainer.odds_ratio_loss(stub, chosen, rejected)
    trl_loss = (-chosen - weighted_log_sigmoid).mean()
    assert_parity(kit, trl_loss, lambda c, r: preference.orpo(c, r, 0.4).mean(), leaves, leaves)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("GRPO", lambda grouped: policy_gradient.grpo_advantages(grouped, 1e-4)),
        ("RLOO", jax.vmap(policy_gradient.leave_one_out_advantages)),
    ],
)
def test_advantages(kit, tmp_path, name, ours):
    generator = random.Random(0)
    rewards = []

    def reward(completions, **_):
        rewards.extend(generator.gauss(0, 1) for _ in completions)
        return rewards

    theirs = trainer(
        kit,
        name,
        tmp_path,
        {"prompt": ["w1 w2", "w3"]},
        llama(kit, 0),
        reward_funcs=reward,
        beta=0.0,
        per_device_train_batch_size=8,
        num_generations=4,
        max_completion_length=3,
    )
    batch = theirs._generate_and_score_completions([{"prompt": p} for p in ["w1 w2"] * 4 + ["w3"] * 4])
    advantages = ours(jnp.asarray(rewards).reshape(2, 4)).reshape(8)
    np.testing.assert_allclose(advantages, batch["advantages"], rtol=1e-4, atol=1e-6)


@functools.cache
def rollout():
    generator = np.random.default_rng(4)
    return {
        "prompt_ids": generator.integers(3, 64, size=(6, 2)),
        "completion_ids": generator.integers(3, 64, size=(6, 3)),
        "completion_mask": np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1]]),
        "advantages": np.array([1.5, -0.7, 0.3, -1.2, 0.8, -0.4], dtype=np.float32),
        # Behaviour and reference: the policy's log-probability and these.
        "behaviour_offset": generator.normal(size=(6, 3)).astype(np.float32) * 0.3,
        "reference_offset": generator.normal(size=(6, 3)).astype(np.float32),
    }


def policy_loss_inputs(kit, name, tmp_path):
    policy = llama(kit, 0)
    theirs = trainer(
        kit,
        name,
        tmp_path,
        {"prompt": ["w1"]},
        policy,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        beta=0.0,
        epsilon=0.2,
        per_device_train_batch_size=6,
        num_generations=2,
        # By default GRPOTrainer multiplies k3 by the ratio, which sends it through the score function as well.
        **({"loss_type": "grpo", "use_bias_correction_kl": False} if name == "GRPO" else {}),
    )
    theirs.model.eval()
    arrays = {key: kit.torch.tensor(value) for key, value in rollout().items()}
    batch = {key: arrays[key] for key in ("prompt_ids", "completion_ids", "completion_mask", "advantages")}
    batch["prompt_mask"] = kit.torch.ones_like(batch["prompt_ids"])
    input_ids = kit.torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    attention_mask = kit.torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    per_token = token_log_probs(policy, input_ids, attention_mask)[:, -3:]
    behaviour = (per_token + arrays["behaviour_offset"]).detach()
    reference = (per_token + arrays["reference_offset"]).detach()
    return theirs, batch, per_token, behaviour, reference


def test_clipped_surrogate_of_whole_answers(kit, tmp_path):
    theirs, batch, per_token, behaviour, _ = policy_loss_inputs(kit, "RLOO", tmp_path)
    mask = batch["completion_mask"]
    log_prob, batch["old_logps"] = (per_token * mask).sum(1), (behaviour * mask).sum(1)
    others = [jnp.asarray(batch[key].numpy()) for key in ("old_logps", "advantages")]
    assert_parity(
        kit,
        theirs._compute_loss(theirs.model, batch),
        lambda x: policy_gradient.ppo_clip(x, *others, 0.2).mean(),
        [log_prob],
        list(theirs.model.parameters()),
    )
    acts = policy_gradient.clipped(jnp.asarray(log_prob.detach().numpy()), *others, 0.2)
    assert 0 < acts.sum() < 6
    np.testing.assert_allclose(theirs._metrics["eval"]["clip_ratio/region_mean"][-1], acts.mean(), rtol=1e-6)


def test_clipped_surrogate_and_k3_of_every_token(kit, tmp_path):
    theirs, batch, per_token, behaviour, reference = policy_loss_inputs(kit, "GRPO", tmp_path)
    theirs.beta = 0.25  # set late: a trainer made with it would look for its reference model on the Hub
    batch["old_per_token_logps"], batch["ref_per_token_logps"] = behaviour, reference
    mask = jnp.asarray(batch["completion_mask"].numpy() == 1)
    advantages = jnp.broadcast_to(batch["advantages"].numpy()[:, None], mask.shape)
    behaviour, reference = jnp.asarray(behaviour.numpy()), jnp.asarray(reference.numpy())

    def ours(log_prob):
        surrogate = policy_gradient.ppo_clip(log_prob, behaviour, advantages, 0.2)
        per_token = surrogate + 0.25 * policy_gradient.kl_k3(log_prob, reference)
        return divergence.masked_mean(per_token, mask, axis=-1).mean()

    trl_loss = theirs._compute_loss(theirs.model, batch)
    assert_parity(kit, trl_loss, ours, [per_token], list(theirs.model.parameters()))


def logits(kit):
    student, teacher = np.random.default_rng(5).normal(size=(2, 2, 5, 16)).astype(np.float32) * 2
    return kit.torch.tensor(student, requires_grad=True), kit.torch.tensor(teacher)


@pytest.mark.parametrize(
    ("beta", "ours"),
    [
        (0.0, divergence.forward_kl),
        (1.0, divergence.reverse_kl),
        *((b, functools.partial(divergence.generalized_jensen_shannon, teacher_share=b)) for b in (0.1, 0.5, 0.9)),
    ],
)
def test_divergences(kit, beta, ours):
    student, teacher = logits(kit)
    labels = kit.torch.tensor([[1, 2, 3, -100, -100], [4, 5, 6, 7, -100]])
    mask = jnp.asarray(labels.numpy() != -100)
    teacher_log_probs = jnp.asarray(teacher.log_softmax(-1).numpy())
    trl_loss = kit.GKDTrainer.generalized_jsd_loss(student, teacher, labels, beta=beta)
    assert_parity(
        kit,
        trl_loss,
        lambda q: divergence.masked_mean(ours(teacher_log_probs, q), mask),
        [student.log_softmax(-1)],
        [student],
    )


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_only_ours_is_continuous_at_the_ends(kit, end):
    student, teacher = logits(kit)
    beside = abs(end - 1e-3)
    theirs = [kit.GKDTrainer.generalized_jsd_loss(student, teacher, beta=b).item() for b in (end, beside)]
    assert theirs[1] < 0.01 * theirs[0]
    log_probs = [jnp.asarray(x.log_softmax(-1).detach().numpy()) for x in (teacher, student)]
    ours = [divergence.generalized_jensen_shannon(*log_probs, b).sum() / 2 for b in (end, beside)]
    np.testing.assert_allclose(ours, [0, theirs[1]], rtol=1e-2, atol=1e-5)
