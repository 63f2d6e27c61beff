"""What tests beside torch and TRL share."""

import types

import pytest


@pytest.fixture(scope="module")
def kit():
    """Everything of torch and TRL, imported offline and only where a test needs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        import datasets
        import tokenizers
        import torch
        import transformers
        import trl
        from trl.experimental.cpo import CPOTrainer
        from trl.experimental.gkd import GKDTrainer
        from trl.experimental.orpo import ORPOTrainer

        vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(61))])}
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
        )
        yield types.SimpleNamespace(
            torch=torch,
            trl=trl,
            llama=transformers.LlamaForCausalLM,
            llama_config=transformers.LlamaConfig,
            dataset=datasets.Dataset.from_dict,
            tokenizer=tokenizer,
            CPOTrainer=CPOTrainer,
            GKDTrainer=GKDTrainer,
            ORPOTrainer=ORPOTrainer,
        )
