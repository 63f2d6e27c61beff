"""The persistent compile cache of jax: switched on, and its hits counted."""

import os
import sys
import tempfile
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
    """jaxkd's own folder in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxkd"


def use_compile_cache(folder: Path | bool = True) -> CacheUse:
    """Keep compiled programs on disk and use them again, in this and in later processes.

    Of several processes that run together (`hosts.initialize`) jax lets process 0 alone write, and a program of one
    process's devices is no other's: the others compile again each time.

    Args:
      folder: True takes jax's own setting (`jax_compilation_cache_dir`, $JAX_COMPILATION_CACHE_DIR) where there is one,
        else `default_folder()`; False changes nothing. A folder that cannot be written is told on stderr and done
        without.
    """
    if folder is False:
        return CacheUse()
    # A text, since it may be a bucket (gs://…), which jax writes to by itself.
    folder = str(jax.config.jax_compilation_cache_dir or default_folder()) if folder is True else str(folder)
    if "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            print(f"no compile cache: cannot write to {folder}: {error.strerror}", file=sys.stderr)
            return CacheUse()
    wanted = {"jax_compilation_cache_dir": folder}
    # At jax's own floors nothing of ours would be stored; floors that somebody set are left.
    for name, default, ours in (
        ("jax_persistent_cache_min_compile_time_secs", 1.0, 0.0),
        ("jax_persistent_cache_min_entry_size_bytes", 0, -1),
    ):
        if getattr(jax.config, name) == default:
            wanted[name] = ours
    changed = [name for name, value in wanted.items() if getattr(jax.config, name) != value]
    for name in changed:
        jax.config.update(name, wanted[name])
    if changed:
        # jax decides once, at the first compilation, whether there is a cache: make it look again.
        compilation_cache.reset_cache()
    return CacheUse()
