import jax
import numpy as np
import pytest
from random_params import random_params

from jaxkd.smollm2 import students, tokenization, weights
from jaxkd.smollm2.config import Config
from jaxkd.smollm2.model import make_model
from jaxkd.smollm2.network import Layout, Network, Setting


def test_spacing_keeps_the_ends_and_is_even():
    assert students.spaced_layers(30, 30) == tuple(range(30))
    assert students.spaced_layers(30, 2) == (0, 29)
    for kept in range(2, 31):
        layers = np.asarray(students.spaced_layers(30, kept))
        assert layers[0] == 0 and layers[-1] == 29
        assert np.ptp(np.diff(layers)) <= 1 or kept == 2


def test_keeps_the_layers_named_and_nothing_is_shared():
    config = Config.tiny(num_layers=5)
    params = random_params(make_model(config))
    smaller, student = students.keep_layers(config, params, [0, 3])
    assert smaller.num_layers == 2
    np.testing.assert_array_equal(student["layers"]["mlp"]["down"], params["layers"]["mlp"]["down"][np.array([0, 3])])
    assert student["embedding"] is not params["embedding"]
    logits = jax.eval_shape(make_model(smaller).logits, student, np.zeros((1, 3), np.int32))
    assert logits.shape == (1, 3, 264)


def test_all_layers_are_the_same_model():
    config = Config.tiny()
    params = random_params(make_model(config))
    same, student = students.keep_layers(config, params, 3)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, student, params)


@pytest.mark.parametrize(
    ("layers", "message"),
    [(4, "at most 3; got 4"), (0, "at least 1"), ([], "empty list"), ([0, 3], "at most 2; got 3"), ([1, 0], "order")],
)
def test_refuses(layers, message):
    config = Config.tiny()
    with pytest.raises(ValueError, match=message):
        students.keep_layers(config, make_model(config).shapes(), layers)


def test_fresh_has_any_shape_and_is_a_checkpoint(tmp_path):
    config = Config.tiny(num_layers=1, hidden_size=16)
    params = students.fresh(config, jax.random.key(0), "bfloat16")
    assert params["layers"]["mlp"]["down"].shape == (1, 40, 16) and params["embedding"].dtype == "bfloat16"
    weights.save_pretrained(tmp_path, config, params)
    loaded_config, loaded = weights.load(tmp_path, dtype="bfloat16")
    assert loaded_config == config
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


@pytest.mark.loose
def test_a_students_start_is_what_its_specification_says(tmp_path):
    config, params = weights.load("random:tiny")
    base = Network(config, params, Setting.of_prompt(tokenization.byte_tokenizer(), "T", 8, 8, Layout()))
    assert students.Start.parse("same").of(base) is base
    cut = students.Start.parse("layers:2").of(base)
    expected = students.keep_layers(config, params, 2)
    assert cut.config == expected[0] and cut.setting is base.setting
    jax.tree.map(np.testing.assert_array_equal, cut.params, expected[1])
    named = students.Start.parse("layers:1,2")
    assert named.layers == (1, 2)
    expected = students.keep_layers(config, params, [1, 2])
    assert named.of(base).config == expected[0]
    jax.tree.map(np.testing.assert_array_equal, named.of(base).params, expected[1])
    with pytest.raises(ValueError, match=r"a layer kept must be .* at most 2; got 7"):
        students.Start.parse("layers:0,7").of(base)
    other = jax.tree.map(lambda leaf: 2 * leaf, params)
    weights.save_pretrained(tmp_path / "same-one", config, other, tokenization.byte_tokenizer())
    found = students.Start.parse(str(tmp_path / "same-one")).of(base)
    jax.tree.map(np.testing.assert_array_equal, found.params, other)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("layers:x", r"must end in a number of layers \(layers:18\), or in the layers themselves \(layers:0,7,29\)"),
        ("layers:0,", "'layers:0,' must end in a number"),
        ("layers:0", "at least 1; got 0"),
        ("layers:0,2,1", r"in increasing order, each once; got \[0, 2, 1\]"),
        ("layers:1,1", r"in increasing order, each once; got \[1, 1\]"),
        ("layers:-1,0", "a layer kept must be a whole number of at least 0; got -1"),
    ],
)
def test_refuses_starts(spec, message):
    with pytest.raises(ValueError, match=message):
        students.Start.parse(spec)
