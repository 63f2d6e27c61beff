"""JSON files of a checkpoint: one object each."""

import json
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
      ValueError: when there is no file, it is not JSON, or it holds something else.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object, got {type(content).__name__}")
    return content


def write_object(path: Path, content: dict) -> None:
    """Write an object, keys in order."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def shown(value: Any) -> str:
    """A value as a message tells it, cut where it is long."""
    told = repr(value)
    return told if len(told) <= 80 else f"{told[:79]}…"
