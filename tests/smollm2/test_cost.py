import jax
import jax.numpy as jnp
import pytest

from jaxkd.smollm2 import cost
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.cost import Cost
from jaxkd.smollm2.model import make_model

CONFIG = Config.tiny(hidden_size=64, intermediate_size=160, num_layers=3)
TOKENS = jax.ShapeDtypeStruct((4, 32), jnp.int32)


def test_the_formula_counts_every_matrix_once():
    matrices = CONFIG.num_parameters - (2 * CONFIG.num_layers + 1) * CONFIG.hidden_size
    assert cost.product_parameters(CONFIG) == matrices
    assert cost.product_parameters(Config.tiny(tie_embeddings=False)) == cost.product_parameters(Config.tiny())


@pytest.mark.parametrize(("differentiate", "passes"), [(False, 1), (True, 3)])
def test_the_formula_is_near_what_xla_counts(differentiate, passes):
    """XLA counts elementwise work and masked scores as well: more, but not by half."""
    model = make_model(CONFIG, unroll=True, remat="none")
    function = lambda params, tokens: jax.nn.logsumexp(model.logits(params, tokens), axis=-1).mean()  # noqa: E731
    function = jax.grad(function) if differentiate else function
    compiled = jax.jit(function).lower(model.shapes(), TOKENS).compile()
    by_formula = passes * cost.forward_flops(CONFIG, 4 * 32, 16)
    assert 0.95 < cost.compiled_flops(compiled) / by_formula < 1.45


def test_costs_add_and_survive_json():
    one = Cost(tokens_sampled=3, seconds=0.5)
    both = one.add(Cost(tokens_sampled=1, model_flops=2e15))
    assert both == Cost(4, 0, 0, 2e15, 0.5)
    assert Cost.from_dict(both.to_dict()) == both
