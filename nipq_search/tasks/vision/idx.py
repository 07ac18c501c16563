"""Reader for IDX files of bytes, plain or compressed: the format of the MNIST family."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nipq_search.errors import UserError

UNSIGNED_BYTE = 8
"""The format's code for uint8, the only element type used for images and labels."""


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """Return the array in an IDX file, which is decompressed if its name ends in `.gz`.

    The file starts with two zero bytes, the element type and the number of dimensions, followed by
    a big-endian 32-bit size for each dimension and then the elements.

    Raises:
        UserError: the file is missing, unreadable or truncated, or has a different element type or
            number of dimensions.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read: permission denied") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); install the file again") from error
    header = 4 + 4 * dimensions
    if data[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]):
        raise UserError(
            f"{path}: not an IDX file of bytes with {dimensions} dimensions (starts with "
            f"{data[:4].hex() or 'nothing'}); install the file again"
        )
    if len(data) < header:
        raise UserError(f"{path}: ends within its header; install the file again")
    shape = struct.unpack(f">{dimensions}I", data[4:header])
    expected = header + math.prod(shape)
    if len(data) != expected:
        raise UserError(
            f"{path}: has {len(data)} bytes, but its header specifies {expected}; "
            "install the file again"
        )
    return np.frombuffer(data, dtype=np.uint8, offset=header).reshape(shape)
