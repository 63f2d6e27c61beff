"""GGUF files that hold only a tokenizer."""

import json

import gguf

from jaxkd.smollm2 import tokenization

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def write_gguf(path, backend, **changes):
    """A GGUF that holds only a tokenizer."""
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_tokenizer_model(changes.get("model", "gpt2"))
    if pre := changes.get("pre", "smollm"):
        writer.add_tokenizer_pre(pre)
    tokens += changes.get("more_tokens", [])
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in CONTROL else 1 for token in tokens][: changes.get("types")])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]] + changes.get("more_merges", []))
    if (begin := changes.get("bos", 1)) is not None:
        writer.add_bos_token_id(begin)
    writer.add_eos_token_id(2)
    if "eot" in changes:
        writer.add_eot_token_id(changes["eot"])
    writer.add_context_length(64)
    if (add_bos := changes.get("add_bos", False)) is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template(changes.get("template", tokenization.CHATML))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
