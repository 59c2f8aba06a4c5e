"""Heat maps as pictures of one pixel a cell, without any library for drawing."""

from __future__ import annotations

import struct
import zlib

import numpy as np

_STOPS = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
    (92, 200, 99),
    (170, 220, 50),
    (253, 231, 37),
)
"""colours from the lowest value to the highest: nine of matplotlib's viridis, which is even to the eye, in print and to the colour-blind"""


def heat_pixels(grid_RC: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    """Return uint8 [rows, columns, 4], red, green, blue and opacity of each cell; NaN is transparent.

    Args:
        lowest: the value of the darkest colour, and of all that is less.
        highest: the value of the brightest colour, and of all that is more.
    """
    share = np.clip((grid_RC - lowest) / ((highest - lowest) or 1.0), 0.0, 1.0)
    known = np.isfinite(grid_RC)
    at = np.where(known, share, 0.0) * (len(_STOPS) - 1)
    stops = np.array(_STOPS, dtype=float)
    pixels = np.zeros((*grid_RC.shape, 4), dtype=np.uint8)
    for channel in range(3):
        pixels[..., channel] = np.rint(np.interp(at, np.arange(len(_STOPS)), stops[:, channel]))
    pixels[..., 3] = 255 * known
    return pixels


def png_bytes(pixels_RC4: np.ndarray) -> bytes:
    """Return a PNG of uint8 [rows, columns, 4] pixels (ISO/IEC 15948: colour type 6, no filter, no interlacing)."""
    rows, columns, channels = pixels_RC4.shape
    assert channels == 4, pixels_RC4.shape
    assert pixels_RC4.dtype == np.uint8, pixels_RC4.dtype
    lines = np.concatenate([np.zeros((rows, 1), dtype=np.uint8), pixels_RC4.reshape(rows, -1)], axis=1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 6, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
