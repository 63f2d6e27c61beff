"""Tokenizers of tests that need no checkpoint."""

from pathlib import Path

import pytest
from tokenizer_gguf import CONTROL
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers

from jaxkd.smollm2 import tokenization


@pytest.fixture(scope="module")
def tokenizer():
    return tokenization.byte_tokenizer()


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE with SmolLM2's rules, learned from a file of tests."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with Path(__file__).with_name("test_tokenization.py").open(encoding="utf-8") as lines:
        backend.train_from_iterator(
            lines,
            trainers.BpeTrainer(
                vocab_size=500,
                special_tokens=CONTROL,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
    return backend
