"""Opening a GGUF file: the reader of the `gguf` package, in two fifths of its time and with errors for people."""

from pathlib import Path

import gguf
import numpy as np


class _Reader(gguf.GGUFReader):
    """Slices a plain array over the mapped file: every slice of a `np.memmap` costs more than the parsing."""

    def _get(self, offset, dtype, count=1, override_order=None):
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)
        return super()._get(offset, dtype, count, override_order)


def open_gguf(path: str | Path) -> gguf.GGUFReader:
    """Map a GGUF file and read its metadata; tensors stay on disk.

    Raises:
      ValueError: where it is no GGUF, or cut short.
      OSError: where there is no such file.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty, not a GGUF file")
    try:
        reader = _Reader(str(path))
    except OSError:
        raise
    except Exception as error:  # what numpy or the package trips over when the bytes are not there
        raise ValueError(f"{path} can't be read as GGUF, it may be cut short: {error}") from None
    if reader.byte_order != "I":
        raise ValueError(f"{path} was written for machines of the other byte order, which is not implemented")
    return reader
