"""Files that are written whole or not at all, claims that processes have on them, and settings that differ."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

PARTIAL = ".partial"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Give a name to write to, in a folder that is there; the file takes its own name when the block has ended well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    yield partial
    partial.replace(path)


@contextmanager
def claim(path: Path, *, wait: bool) -> Iterator[bool]:
    """Keep other processes from what is at a path for as long as the block lasts; a killed process keeps nothing.

    Args:
      path: a file or folder, there or not; its claim is a file beside it.
      wait: until another's claim ends.

    Yields:
      Whether the claim is this process's own; always where it waits.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What a folder was begun with and what is asked for now, wherever they differ."""
    return [
        f"{key}: {_short(held.get(key))} there, {_short(wanted.get(key))} now"
        for key in sorted({*held, *wanted})
        if held.get(key) != wanted.get(key)
    ]


def _short(value: Any) -> str:
    told = str(value)
    return told if len(told) <= 80 else f"{told[:77]}…"
