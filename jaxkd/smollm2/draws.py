"""Draws and scores of texts on disk: made once, gone on with after a kill, written whole or not at all."""

import time
from pathlib import Path

import jax
import numpy as np

from jaxkd import files
from jaxkd.smollm2.metering import Workshop
from jaxkd.smollm2.network import Network, join
from jaxkd.smollm2.policy import Texts

KEEP_EVERY = 60.0
"""Seconds after which draws that are not complete are kept on disk."""


def kept_draws(
    path: Path, network: Network, key: jax.Array, total: int, temperature: float, workshop: Workshop
) -> Texts:
    """Draws from a file, or drawn now and written to it; goes on where there are fewer, and after a kill."""
    begun = begun_of(path)
    kept = {file: read_texts(file) for file in (path, begun) if file.exists()}
    parts = [max(kept.values(), key=lambda x: len(x.tokens))] if kept else []
    done = sum(len(part.tokens) for part in parts)
    if done >= total and [*kept] == [path]:
        return parts[0]
    kept_at = time.monotonic()
    with workshop.counted(total, "sample", done) as tick:
        for part in network.draws(key, total, temperature, first=done):
            parts.append(part)
            tick(len(part.tokens), int(part.completion_mask.sum()))
            if time.monotonic() - kept_at >= KEEP_EVERY:
                write_arrays(begun, join(parts)._asdict())
                kept_at = time.monotonic()
    x = join(parts)
    write_arrays(path, x._asdict())
    begun.unlink(missing_ok=True)
    return x


def kept_scores(path: Path, network: Network, x: Texts, workshop: Workshop, what: str) -> np.ndarray:
    """log π of each token of fixed texts (`Network.token_log_prob`), from a file as draws are."""
    begun, total = begun_of(path), len(x.tokens)
    if path.exists():
        # Left there by a kill just after the whole was written.
        begun.unlink(missing_ok=True)
        return _read_scores(path)
    parts = [_read_scores(begun)] if begun.exists() else []
    done = sum(map(len, parts))
    kept_at = time.monotonic()
    with workshop.counted(total, what, done) as tick:
        for part in network.scored(x, first=done):
            parts.append(part)
            tick(len(part), int(x.completion_mask[done : done + len(part)].sum()))
            done += len(part)
            if time.monotonic() - kept_at >= KEEP_EVERY:
                write_arrays(begun, {"log_prob": np.concatenate(parts)})
                kept_at = time.monotonic()
    log_prob = np.concatenate(parts)
    write_arrays(path, {"log_prob": log_prob})
    begun.unlink(missing_ok=True)
    return log_prob


def begun_of(path: Path) -> Path:
    """Where what is not complete is kept."""
    return path.with_name(f"begun-{path.name}")


def _read_scores(path: Path) -> np.ndarray:
    with np.load(path) as file:
        return file["log_prob"]


def read_texts(path: Path) -> Texts:
    """Draws from their file."""
    with np.load(path) as file:
        return Texts(**{name: file[name] for name in Texts._fields})


def write_arrays(path: Path, arrays: dict) -> None:
    """Write named arrays whole or not at all."""
    with files.whole(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
