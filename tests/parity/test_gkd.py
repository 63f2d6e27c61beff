"""Our token-level distillation step against TRL's GKD: value, and gradient of every parameter, on whole models.

Two tiny Llamas of torch are written as checkpoints and read by our own reader, so the streamed head, the masks and the
backward pass through the model are all held against torch. TRL 1.16's loss is a plain function of logits. Its mean is
over all tokens with a label ("batchmean" divides by their number), as ours is over tokens of completions; at β = 0 it
returns KL(teacher ‖ student), at β = 1 KL(student ‖ teacher), where ours are divergences of their own.

The gradient of torch is read as if it were a checkpoint: no list of names is needed to find the same parameter.
"""

import copy
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxkd import distill
from jaxkd.smollm2 import distillation, policy, weights
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.policy import Texts

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

LENGTH = 12
TOKENS = np.random.default_rng(0).integers(3, 64, size=(4, LENGTH))
# Where prompt, completion and padding after it begin: padding on neither side, on both, on the left, on the right.
PROMPT, COMPLETION, END = (np.array(starts)[:, None] for starts in ([0, 2, 5, 0], [4, 5, 7, 1], [12, 10, 12, 9]))
MASK = (np.arange(LENGTH) >= PROMPT) & (np.arange(LENGTH) < END)
COMPLETION_MASK = MASK & (np.arange(LENGTH) >= COMPLETION)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    """Torch, TRL's loss, and a student and a teacher, each of them torch's and ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        import torch
        import transformers
        from trl.experimental.gkd import GKDTrainer

        def read(model):
            folder = tmp_path_factory.mktemp("checkpoint")
            model.save_pretrained(folder)
            return weights.load(folder)

        def pair(seed, **changes):
            torch.manual_seed(seed)
            theirs = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    vocab_size=64,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    max_position_embeddings=64,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=1,
                    initializer_range=0.2,  # ten times the usual: divergences of a nat, not of their quadratic limit
                    attn_implementation="eager",
                    **changes,
                )
            )
            config, params = read(theirs)
            return types.SimpleNamespace(theirs=theirs, model=make_model(config), params=params)

        yield types.SimpleNamespace(
            torch=torch,
            loss=GKDTrainer.generalized_jsd_loss,
            read=read,
            students={
                tied: pair(0, hidden_size=16, intermediate_size=32, num_hidden_layers=2, tie_word_embeddings=tied)
                for tied in (True, False)
            },
            teacher=pair(1, hidden_size=32, intermediate_size=48, num_hidden_layers=3, tie_word_embeddings=True),
        )


def theirs(kit, student, beta):
    """TRL's loss, and its gradient as a pytree like our parameters."""
    mask = kit.torch.tensor(MASK)
    # Llama in torch numbers positions from the left edge, padding or not.
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": kit.torch.tensor(TOKENS), "attention_mask": mask.long(), "position_ids": positions}
    labels = kit.torch.tensor(np.where(COMPLETION_MASK, TOKENS, -100))[:, 1:]
    with kit.torch.no_grad():
        teacher_logits = kit.teacher.theirs(**inputs).logits[:, :-1]
    model = student.theirs
    model.zero_grad()
    loss = kit.loss(model(**inputs).logits[:, :-1], teacher_logits, labels, beta=beta)
    loss.backward()
    gradient = copy.deepcopy(model)
    for target, source in zip(gradient.parameters(), model.parameters(), strict=True):
        target.data = source.grad
    return loss.item(), kit.read(gradient)[1]


KEEP_GRADIENT = optax.GradientTransformation(lambda params: params, lambda gradient, *_: (gradient, gradient))
"""An optimiser whose state is the last gradient."""


@pytest.fixture(scope="module")
def step_of(kit):
    """Our step by student and divergence, compiled once for all coefficients."""

    @functools.cache
    def make(tied, divergence):
        compare = distillation.make_comparison(kit.students[tied].model, kit.teacher.model, divergence)
        return jax.jit(distill.token_level_step(compare, KEEP_GRADIENT))

    return make


def ours(kit, student, step, coefficient):
    """The loss of our step, and its gradient."""
    x = Texts(jnp.asarray(TOKENS, jnp.int32), jnp.asarray(MASK), jnp.asarray(COMPLETION_MASK))
    state, info = step(
        distill.State(student.params, KEEP_GRADIENT.init(student.params)),
        distill.TokenInputs(x, kit.teacher.params, jnp.float32(0.0), jnp.float32(coefficient)),
    )
    assert info.num_tokens == COMPLETION_MASK.sum()
    return float(info.loss), state.optimizer_state


@pytest.mark.parametrize(
    ("tied", "beta", "divergence"),
    [
        (True, 0.0, "forward_kl"),
        *((True, beta, "generalized_jensen_shannon") for beta in (0.1, 0.5, 0.9)),
        (True, 1.0, "reverse_kl"),
        # Of an untied head the gradient goes elsewhere, whatever the divergence.
        (False, 0.5, "generalized_jensen_shannon"),
    ],
)
def test_loss_and_gradient(kit, step_of, monkeypatch, tied, beta, divergence):
    # Several blocks each way, the last of them not full.
    monkeypatch.setattr(policy, "TOKEN_CHUNK", 8)
    monkeypatch.setattr(policy, "VOCAB_BLOCK", 24)
    student = kit.students[tied]
    their_loss, their_gradient = theirs(kit, student, beta)
    our_loss, our_gradient = ours(kit, student, step_of(tied, divergence), beta)
    assert their_loss > 0.05
    np.testing.assert_allclose(our_loss, their_loss, rtol=1e-4)
    assert jax.tree.structure(our_gradient) == jax.tree.structure(their_gradient)
    worst = 0.0
    for one, other in zip(jax.tree.leaves(our_gradient), jax.tree.leaves(their_gradient), strict=True):
        assert np.abs(other).max() > 1e-4
        worst = max(worst, float(np.abs(one - other).max() / np.abs(other).max()))
    print(f"β = {beta}: loss {our_loss:.4f} nats, off by {our_loss / their_loss - 1:.1e}; gradient by {worst:.1e}")
    assert worst < 1e-4
