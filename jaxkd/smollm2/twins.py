"""Alignments that begin at the same weights and are held to the same ones are made once and measured once.

At τ = 1 a student of the base's depth may stay the base: no update on the base's own samples lowers the held-out loss.
Aligning it is then aligning the base, number for number, and an alignment and its measurement are most of what a model
takes. What is taken from a twin is what would have been computed, its cost too. (The student itself is given the base's
measurement, with its samples and its cost, whatever its seed: `laboratory`.) Of two that are begun at the same time
both are computed.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path

from jaxkd import durable
from jaxkd.smollm2.draws import begun_of, read_texts, write_arrays
from jaxkd.smollm2.metering import Workshop
from jaxkd.smollm2.network import Network, fingerprint
from jaxkd.smollm2.rows import Row

MADE_OF = "made_of"
_LEARNED_FROM, _MEASURED_BY = "pairs.npz", "samples.npz"


def made_of(row: Row, start: Network, reference: Network, look_every: int) -> str:
    """All that an alignment and its log depend on beside what its run folder keeps to, as a hash."""
    weights = {id(network): network for network in (start, reference)}
    hashes = {number: fingerprint(network) for number, network in weights.items()}
    parts = (row.algorithm, row.kl_coef, row.seed, look_every, hashes[id(start)], hashes[id(reference)])
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:24]


def find(folders: Iterable[Path], wanted: str, file: str) -> Path | None:
    """The first of some folders that is finished, made of the same, and holds a file; None where there is none."""
    for folder in folders:
        record = durable.read_record(folder) or {}
        if record.get(MADE_OF) == wanted and "failed" not in record and (folder / file).exists():
            return folder
    return None


def take_steps(twin: Path, folder: Path, workshop: Workshop) -> None:
    """What a twin logged, under this folder's name, what it drew to learn from, and its cost."""
    log = workshop.log(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log.begin(0)
    for entry in durable.entries(twin / durable.METRICS):
        log.write(entry["step"], {name: value for name, value in entry.items() if name not in ("stage", "step")})
    _take(twin, folder, _LEARNED_FROM)
    workshop.restore(durable.read_record(twin)["cost"])


def take_samples(twin: Path, folder: Path) -> None:
    """What a twin was measured by."""
    _take(twin, folder, _MEASURED_BY)


def _take(twin: Path, folder: Path, name: str) -> None:
    if (twin / name).exists():
        write_arrays(folder / name, read_texts(twin / name)._asdict())
    # This folder may have begun with draws of its own before its twin was there.
    begun_of(folder / name).unlink(missing_ok=True)
