import math

import jax
import jax.numpy as jnp
import pytest

from jaxkd.smollm2 import cost, policy
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.cost import Cost
from jaxkd.smollm2.model import make_model

CONFIG = Config.tiny(hidden_size=64, intermediate_size=160, num_layers=3)
TOKENS = jax.ShapeDtypeStruct((4, 32), jnp.int32)


def test_the_formula_counts_every_matrix_once():
    matrices = CONFIG.num_parameters - (2 * CONFIG.num_layers + 1) * CONFIG.hidden_size
    assert cost.product_parameters(CONFIG) == matrices
    assert cost.product_parameters(Config.tiny(tie_embeddings=False)) == cost.product_parameters(Config.tiny())


def test_costs_add_and_survive_json():
    one = Cost(tokens_sampled=3, seconds=0.5)
    both = one.add(Cost(tokens_sampled=1, model_flops=2e15))
    assert both == Cost(4, 0, 0, 2e15, 0.5)
    assert Cost.from_dict(both.to_dict()) == both


# Wide heads, so that elementwise work, which only XLA counts, is small beside the products.
WIDE = {"hidden_size": 64, "intermediate_size": 160, "head_dim": 32}


def _counted_by_xla(config, remat, differentiate=True, unroll=True):
    model = make_model(config, unroll=unroll, remat=remat)
    function = lambda params, tokens: model.logits(params, tokens).mean()  # noqa: E731
    program = jax.jit(jax.value_and_grad(function) if differentiate else function)
    return cost.counted_flops(program.lower(model.shapes(), TOKENS).compile())


def test_formula_and_xla_agree_where_every_score_is_counted():
    """A context of the whole length, for the program computes the scores that the causal mask throws away too."""
    config, (batch, length) = Config.tiny(num_layers=2, **WIDE), TOKENS.shape
    forward = cost.forward_flops(config, batch * length, length)
    training = cost.training_flops(config, batch * length, length)
    assert 1 <= _counted_by_xla(config, "none", differentiate=False) / forward < 1.03
    assert 1 <= _counted_by_xla(config, "none") / training < 1.03
    # Layers computed again: a fourth pass, without the head and the last product, whose result no gradient reads.
    head = batch * length * 2 * cost.head_parameters(config)
    last = batch * length * 2 * config.num_layers * config.hidden_size * config.intermediate_size
    again = training + forward - head - last
    assert _counted_by_xla(config, "layers") == pytest.approx(again, rel=0.05)


def test_xla_counts_one_layer_of_a_scan():
    (batch, length), config = TOKENS.shape, Config.tiny(num_layers=3, **WIDE)
    one_layer = cost.forward_flops(Config.tiny(num_layers=1, **WIDE), batch * length, length)
    counted = _counted_by_xla(config, "none", differentiate=False, unroll=False)
    assert counted == pytest.approx(one_layer, rel=0.05)


def test_flops_that_are_not_counted_are_refused():
    class Uncounted:
        def cost_analysis(self):
            return None

    with pytest.raises(ValueError, match="counts no FLOPs"):
        cost.counted_flops(Uncounted())


def test_mean_context_counts_every_token():
    assert cost.mean_context(5) == (1 + 2 + 3 + 4 + 5) / 5
    assert cost.mean_context([1, 3]) == (1 + 1 + 2 + 3) / 4
    assert math.isnan(cost.mean_context([0, 0]))


@pytest.mark.parametrize("differentiate", [False, True])
def test_loops_are_counted_in_full(differentiate):
    """Beside a program without a loop: three layers written out, and one chunk of positions."""
    config, (batch, length) = Config.tiny(num_layers=3, **WIDE), TOKENS.shape
    model = make_model(config, unroll=True, remat="layers")
    function = lambda params, tokens: policy.token_log_probs(model, params, tokens).sum()  # noqa: E731
    program = jax.jit(jax.grad(function) if differentiate else function).lower(model.shapes(), TOKENS)
    counted = cost.log_prob_flops(config, batch, length, differentiate=differentiate, remat="layers")
    assert counted == pytest.approx(cost.counted_flops(program), rel=0.02)
    twice = cost.log_prob_flops(config, 64 * batch, length, differentiate=differentiate, remat="layers")
    assert twice == pytest.approx(64 * counted, rel=0.02)


def test_a_cost_with_missing_entries_is_refused():
    with pytest.raises(ValueError, match="missing: model_flops, seconds"):
        Cost.from_dict({"tokens_sampled": 1, "tokens_trained": 1, "tokens_scored": 1})
