"""Our steps of DPO, robust DPO, IPO and KTO against TRL's trainers: value, and gradient of every parameter.

Two tiny Llamas of torch are written as checkpoints and read by our own reader; TRL makes the batch. So the reference's
log-probabilities, the masks, the means over tokens, the loss and the backward pass through the model are all those of
the step that serves the mixture and SmolLM2. Of KTO's reference point TRL's stand-in for fresh draws is taken: the
answers of the batch, each after another's prompt. (The other losses are held against TRL's in test_trl_losses.py.)
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import align
from jaxkd.smollm2 import weights
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.policy import Texts, make_policy
from tests.parity.trainers import ANSWERS, PAIRS, llama, trainer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

KEEP_GRADIENT = optax.GradientTransformation(lambda params: params, lambda gradient, *_: (gradient, gradient))
"""An optimiser whose state is the last gradient."""
COEFFICIENTS = align.Coefficients(learning_rate=0.0, kl_coef=0.3, label_smoothing=0.15, desirable_threshold=0.5)


def read(model, folder):
    model.save_pretrained(folder)
    return weights.load(folder)


def texts(batch, prefix=""):
    """A batch of TRL's as ours."""
    ids, mask, answers = (
        batch[f"{prefix}{name}"].numpy() for name in ("input_ids", "attention_mask", "completion_mask")
    )
    return Texts(jnp.asarray(ids, jnp.int32), jnp.asarray(mask == 1), jnp.asarray(answers == 1))


def by_trl(theirs, batch, folder):
    """The loss of a trainer, and its gradient read as if it were a checkpoint."""
    model = theirs.model
    model.zero_grad()
    loss = theirs.compute_loss(model, batch)
    loss.backward()
    gradient = copy.deepcopy(model)
    for target, source in zip(gradient.parameters(), model.parameters(), strict=True):
        target.data = source.grad
    return loss.item(), read(gradient, folder)[1]


def by_us(name, policy, params, reference, x, rewards, fresh=None):
    """The loss of our step, and its gradient."""
    settings = align.AlignmentSettings(name, batch_size=len(rewards))
    step = align.make_step(policy, KEEP_GRADIENT, settings, lambda x: rewards, lambda x: rewards > 0)
    preferred = jnp.ones(len(rewards) // 2, bool)
    data = align.PreferenceData(x, rewards, preferred, jax.jit(policy.log_prob)(reference, x))
    coefficients = align.Coefficients(*map(jnp.float32, COEFFICIENTS))
    inputs = align.Inputs(jax.random.key(0), reference, coefficients, fresh, data)
    state, info = jax.jit(step)(align.State(params, KEEP_GRADIENT.init(params)), inputs)
    return float(info.loss), state.optimizer_state


def assert_same(ours, theirs):
    (our_loss, our_gradient), (their_loss, their_gradient) = ours, theirs
    np.testing.assert_allclose(our_loss, their_loss, rtol=1e-4)
    assert jax.tree.structure(our_gradient) == jax.tree.structure(their_gradient)
    for one, other in zip(jax.tree.leaves(our_gradient), jax.tree.leaves(their_gradient), strict=True):
        assert np.abs(other).max() > 1e-4
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


@pytest.fixture
def models(kit, tmp_path):
    """A policy and a reference: torch's, and the policy's functions with both parameters as ours."""
    theirs = [llama(kit, seed) for seed in (0, 1)]
    (config, params), (_, reference) = (read(model, tmp_path / str(i)) for i, model in enumerate(theirs))
    return theirs, make_policy(make_model(config), [[0]], [[True]], max_new_tokens=8), params, reference


@pytest.mark.parametrize(
    ("name", "loss_type", "label_smoothing"),
    [("offline_dpo_data", "sigmoid", 0.0), ("robust_dpo", "robust", 0.15), ("ipo", "ipo", 0.0)],
)
def test_pairs(kit, models, tmp_path, name, loss_type, label_smoothing):
    (theirs, held_to), policy, params, reference = models
    made = trainer(
        kit,
        "DPO",
        tmp_path,
        PAIRS,
        theirs,
        ref_model=held_to,
        beta=COEFFICIENTS.kl_coef,
        loss_type=loss_type,
        label_smoothing=label_smoothing,
        per_device_train_batch_size=4,
    )
    batch = next(iter(made.get_train_dataloader()))
    # TRL puts the chosen answers first, as our pairs are: the first half with the second.
    ours = by_us(name, policy, params, reference, texts(batch), jnp.zeros(8))
    assert_same(ours, by_trl(made, batch, tmp_path / "gradient"))


def test_kto(kit, models, tmp_path):
    (held_to, theirs), policy, reference, params = models
    made = trainer(
        kit,
        "KTO",
        tmp_path,
        ANSWERS,
        theirs,
        ref_model=held_to,
        beta=COEFFICIENTS.kl_coef,
        desirable_weight=1.0,
        undesirable_weight=1.0,
        per_device_train_batch_size=4,
    )
    batch = next(iter(made.get_train_dataloader()))
    rewards = jnp.asarray(batch["label"].numpy(), jnp.float32)
    ours = by_us("kto", policy, params, reference, texts(batch), rewards, texts(batch, "KL_"))
    assert_same(ours, by_trl(made, batch, tmp_path / "gradient"))
    # The reference point is above 0, where it counts.
    assert made._metrics["train"]["kl"][-1] > 0
