import pytest

from jaxkd.smollm2.config import Config

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 576,
    "initializer_range": 0.041666666666666664,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pad_token_id": 2,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def test_reads_the_entries_of_a_checkpoint():
    config = Config.from_hf(SMOLLM2_135M)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (30, 9, 3, 64)
    assert config.rope_theta == 100000.0 and config.tie_embeddings and config.eos_ids == (2,)
    assert config.num_parameters == 134_515_008
    assert config.initializer_range == 0.041666666666666664 == config.to_hf()["initializer_range"]
    without = Config.from_hf({name: value for name, value in SMOLLM2_135M.items() if name != "initializer_range"})
    # transformers' own. What tells models that are read apart knows nothing of it.
    assert without.initializer_range == 0.02 and repr(without) == repr(config)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "eos_ids": (2, 0)}, {"eos_ids": (), "pad_id": None}])
def test_comes_back_from_its_own_entries(changes):
    config = Config.tiny(**changes)
    assert Config.from_hf(config.to_hf("float32")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mistral"}, "model_type must be 'llama'.*'mistral'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' is not implemented"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 8.0}}, "'yarn' is not implemented"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear' is not implemented"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
            "'yarn' is not implemented",
        ),
        (
            {"rope_scaling": {"rope_type": "default"}, "rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"attention_bias": True}, "attention_bias must be False"),
        ({"hidden_size": None}, "no hidden_size"),
        ({"num_key_value_heads": 2}, "num_heads must be a multiple of num_kv_heads; got 9 and 2"),
        ({"eos_token_id": 50000}, "eos_ids"),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq'"),
        ({"rope_theta": "much"}, "rope_theta must be a number; got 'much'"),
        ({"rope_theta": [1]}, r"rope_theta must be a number; got \[1\]"),
        ({"rms_norm_eps": {"value": 1}}, "rms_norm_eps must be a number"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false; got 'false'"),
        ({"pad_token_id": "2"}, "pad_id must be a whole number .* got 2"),
        ({"eos_token_id": {"id": 2}}, "eos_ids must be a whole number .* got {'id': 2}"),
        ({"bos_token_id": [1]}, r"bos_id must be a whole number .* got \[1\]"),
        ({"num_key_value_heads": "3"}, "num_kv_heads must be a whole number"),
        ({"head_dim": [64]}, "head_dim must be a whole number"),
        ({"max_position_embeddings": "8192"}, "max_positions must be a whole number"),
        ({"hidden_size": "576"}, "hidden_size must be a whole number; got '576'"),
        ({"rope_parameters": 5}, "rope_parameters must be an object; got 5"),
    ],
)
def test_refuses_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.from_hf(SMOLLM2_135M | changes)


@pytest.mark.parametrize(
    ("changes", "theta"),
    [
        ({"rope_theta": None}, 10000.0),
        ({"rope_theta": 7.0}, 7.0),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, 5.0),
        ({"rope_scaling": {"rope_theta": 3.0}, "rope_parameters": {"rope_theta": 5.0}}, 3.0),
        ({"rope_theta": 7.0, "rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 5.0}}, 7.0),
    ],
)
def test_base_of_the_rotary_angles_is_the_one_that_transformers_takes(changes, theta):
    import transformers

    entries = SMOLLM2_135M | changes
    assert Config.from_hf(entries).rope_theta == theta
    # transformers 5 has no top-level theta that is None.
    theirs = transformers.LlamaConfig.from_dict({key: value for key, value in entries.items() if value is not None})
    assert theirs.rope_parameters["rope_theta"] == theta


def _gguf_fields():
    return {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 128,
        "llama.embedding_length": 16,
        "llama.feed_forward_length": 32,
        "llama.attention.head_count": 2,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.vocab_size": 300,
    }


def test_gguf_numbers_are_those_that_were_meant():
    assert Config.from_gguf(_gguf_fields(), tie_embeddings=True).norm_epsilon == 1e-05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, "'qwen2'"),
        ({"llama.rope.scaling.type": "yarn"}, "'yarn' is not implemented"),
        ({"llama.rope.scaling.factor": 4.0}, "'linear' by 4.0 is not implemented"),
        ({"llama.rope.scale_linear": 2.0}, "'linear' by 2.0 is not implemented"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}, "'linear' by 4.0 is not implemented"),
        ({"llama.expert_count": 8}, "8 experts"),
        ({"llama.embedding_length": "16"}, "llama.embedding_length must be a number; got '16'"),
        ({"llama.rope.scaling.factor": "4"}, "llama.rope.scaling.factor must be a number; got '4'"),
        ({"llama.feed_forward_length": [8, 8]}, r"llama.feed_forward_length must be a number; got \[8, 8\]"),
        ({"llama.rope.freq_base": [1.0]}, "llama.rope.freq_base must be a number"),
        ({"tokenizer.ggml.eot_token_id": [2]}, "tokenizer.ggml.eot_token_id must be a number"),
    ],
)
def test_gguf_refuses_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Config.from_gguf(_gguf_fields() | changes, tie_embeddings=True)


@pytest.mark.parametrize(
    "changes",
    [
        {"llama.rope.scaling.factor": 0.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 1.0, "llama.rope.scale_linear": 4.0},
    ],
)
def test_gguf_scaling_that_scales_nothing_is_read(changes):
    plain = Config.from_gguf(_gguf_fields(), tie_embeddings=True)
    assert Config.from_gguf(_gguf_fields() | changes, tie_embeddings=True) == plain


def test_gguf_names_what_is_missing():
    fields = _gguf_fields()
    del fields["llama.block_count"]
    with pytest.raises(ValueError, match=r"llama\.block_count"):
        Config.from_gguf(fields, tie_embeddings=True)
