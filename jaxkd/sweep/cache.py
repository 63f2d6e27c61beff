"""The persistent compile cache of jax: switched on, and its hits counted."""

import os
import sys
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

_hits = 0


def _on_event(event: str, **_) -> None:
    global _hits
    if event == "/jax/compilation_cache/cache_hits":
        _hits += 1


jax.monitoring.register_event_listener(_on_event)


class CacheUse:
    """Counts the programs that came from the cache since it was made."""

    def __init__(self):
        """Begin to count."""
        self._before = _hits

    @property
    def hits(self) -> int:
        """Programs so far."""
        return _hits - self._before


def default_folder() -> Path:
    """$JAX_COMPILATION_CACHE_DIR, or jaxkd's own folder in the user's cache."""
    own = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxkd"
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or own)


def use_compile_cache(folder: Path | bool = True) -> CacheUse:
    """Keep compiled programs on disk and use them again, in this and in later processes.

    Args:
      folder: True leaves jax's own setting (`jax_compilation_cache_dir`) where there is one, else takes
        `default_folder()`; False changes nothing. A folder that cannot be written is told on stderr and done without.
    """
    if folder is False or (folder is True and jax.config.jax_compilation_cache_dir):
        return CacheUse()
    folder = default_folder() if folder is True else Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        print(f"no compile cache: {folder}: {error.strerror}", file=sys.stderr)
        return CacheUse()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # At jax's own floors of 1 s and some bytes it stored nothing of ours.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # jax decides once, at the first compilation, whether there is a cache: make it look again.
    compilation_cache.reset_cache()
    return CacheUse()
