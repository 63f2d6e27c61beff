"""A folder of samples on disk: shards of rows, written whole or not at all, gone on with after a kill.

    out/corpus.json               what the samples depend on, and versions
    out/part-00000.parquet        rows 0 to samples_per_shard − 1, and so on (or .jsonl)

A row has the columns of a prompt+completion file, so that `example_files.read_examples(out)` reads it back token for
token, and more:

    prompt            string          what the model was given
    completion        string          what it wrote, without the token that ends it
    prompt_ids        list of int     ids of the prompt
    completion_ids    list of int     ids that were drawn, the end included
    log_prob          float           log-probability of the drawn ids given the prompt, at temperature 1 (nats)
    finished          bool            whether an end was drawn before the length ran out
    prompt_index      int             which prompt
    sample_index      int             which of that prompt's samples
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from jaxkd import files

MANIFEST = "corpus.json"
FORMATS = ("parquet", "jsonl")

SCHEMA = pyarrow.schema(
    [
        ("prompt", pyarrow.string()),
        ("completion", pyarrow.string()),
        ("prompt_ids", pyarrow.list_(pyarrow.int32())),
        ("completion_ids", pyarrow.list_(pyarrow.int32())),
        ("log_prob", pyarrow.float32()),
        ("finished", pyarrow.bool_()),
        ("prompt_index", pyarrow.int64()),
        ("sample_index", pyarrow.int64()),
    ]
)


@dataclass(frozen=True)
class Corpus:
    """Where the rows are and how they are cut: `total` rows in shards of `per_shard`, in one of `FORMATS`."""

    directory: Path
    total: int
    per_shard: int
    form: str = "parquet"

    def path(self, shard: int) -> Path:
        """The file of a shard."""
        return self.directory / f"part-{shard:05d}.{self.form}"

    def missing(self) -> Iterator[tuple[int, range]]:
        """Shards that are not written yet, each with the numbers of its rows."""
        for shard in range(-(-self.total // self.per_shard)):
            if not self.path(shard).exists():
                yield shard, range(shard * self.per_shard, min((shard + 1) * self.per_shard, self.total))

    def write(self, shard: int, rows: Sequence[dict]) -> None:
        """Write a shard: it appears under its name only when complete."""
        table = pyarrow.Table.from_pylist(list(rows), schema=SCHEMA)
        with files.whole(self.path(shard)) as partial:
            (_parquet if self.form == "parquet" else _jsonl)(partial, table)


def _parquet(path: Path, table: pyarrow.Table) -> None:
    pyarrow.parquet.write_table(table, path)


def _jsonl(path: Path, table: pyarrow.Table) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in table.to_pylist())


def check(corpus: Corpus, configuration: dict, *, overwrite: bool = False, later: Sequence[str] = ()) -> None:
    """Make sure that the folder is free, or was begun with this very configuration.

    Args:
      corpus: what is to be written.
      configuration: all that the rows depend on; plain JSON.
      overwrite: whether samples of another configuration may be deleted; nothing else ever is.
      later: names in the folder's configuration that are not known yet.

    Raises:
      FileExistsError: when the folder holds something else; names what differs.
    """
    manifest = corpus.directory / MANIFEST
    if manifest.exists():
        if not overwrite:
            _check_same(manifest, json.loads(json.dumps(configuration)), later)
    elif corpus.directory.exists() and not (corpus.directory.is_dir() and _is_free(corpus.directory)):
        raise FileExistsError(f"{corpus.directory} exists and holds no samples of jaxkd: choose another --out")


def begin(corpus: Corpus, configuration: dict, versions: dict, *, overwrite: bool = False) -> None:
    """Make the folder, or go on with it; arguments and errors as for `check`, and versions that are noted in it."""
    check(corpus, configuration, overwrite=overwrite)
    manifest = corpus.directory / MANIFEST
    if overwrite and manifest.exists():
        # The manifest last: killed in between, the folder can still be told to hold samples.
        for old in (*corpus.directory.glob("part-*"), manifest):
            old.unlink()
    for torn in corpus.directory.glob(f"*{files.PARTIAL}"):
        torn.unlink()
    if manifest.exists():
        return
    content = json.dumps({"configuration": configuration, "versions": versions}, indent=2, ensure_ascii=False)
    with files.whole(manifest) as partial:
        partial.write_text(content + "\n", encoding="utf-8")


def _is_free(directory: Path) -> bool:
    """Whether nothing is in a folder but a manifest that was cut short."""
    return all(path.name == MANIFEST + files.PARTIAL for path in directory.iterdir())


def _check_same(manifest: Path, wanted: dict, later: Sequence[str]) -> None:
    try:
        held = json.loads(manifest.read_text(encoding="utf-8"))["configuration"]
    except (ValueError, KeyError):
        raise FileExistsError(f"{manifest} can't be read: choose another --out, or give --overwrite") from None
    differing = files.differences({key: value for key, value in held.items() if key not in later}, wanted)
    if differing:
        raise FileExistsError(
            f"{manifest.parent} holds samples of another configuration ({'; '.join(differing)}): "
            "give --overwrite to replace them, or another --out"
        )
