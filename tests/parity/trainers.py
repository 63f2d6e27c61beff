"""TRL's trainers on a tiny random Llama of torch, and what they learn from."""

PAIRS = {
    "prompt": ["w1 w2", "w3", "w9 w2 w5", "w7"],
    "chosen": [" w4 w5 w6", " w7", " w30 w31", " w8 w8"],
    "rejected": [" w8", " w9 w10 w11 w12", " w40", " w50 w51"],
}
ANSWERS = {
    "prompt": PAIRS["prompt"],
    "completion": PAIRS["chosen"],
    "label": [True, False, False, True],
}


def llama(kit, seed):
    kit.torch.manual_seed(seed)
    config = kit.llama_config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.2,  # ten times the usual: log-ratios of a few nats, where the losses are not linear
    )
    return kit.llama(config)


def trainer(kit, name, tmp_path, data, model, **settings):
    arguments = {"model": model, "processing_class": kit.tokenizer, "train_dataset": kit.dataset(data)}
    if "ref_model" in settings:
        arguments["ref_model"] = settings.pop("ref_model")
    if "reward_funcs" in settings:
        arguments["reward_funcs"] = settings.pop("reward_funcs")
    config = getattr(kit.trl, f"{name}Config")(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        **settings,
    )
    return getattr(kit.trl, f"{name}Trainer")(args=config, **arguments)
