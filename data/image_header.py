"""The format and the size of an encoded image, read from its header as the decoders read them."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator


def read_header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Return the format and (width, height) of an encoded image; the size is (0, 0) if unknown.

    The format is "JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF", "JP2", or "" for any other.
    """
    for kind, start, read in _FORMATS:
        if re.match(start, data, re.DOTALL):
            try:
                width, height = read(data)
                return kind, (abs(width), abs(height))
            except (struct.error, ValueError, IndexError, KeyError, StopIteration):
                return kind, (0, 0)  # a header that is cut off or damaged
    return "", (0, 0)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, position) of each segment of a JPEG, up to the first scan (0xDA)."""
    position = data.find(b"\xff", 2)
    while 0 <= position < len(data) - 3:
        marker = data[position + 1]
        if marker == 0xFF:  # fill byte
            position += 1
            continue
        yield marker, position
        if marker == 0xDA:
            return
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        position = data.find(b"\xff", position)


def is_complete(data: bytes) -> bool:
    """Return whether a JPEG or PNG has its end marker; other formats count as complete.

    OpenCV fills what is missing in a JPEG, and makes room for chunks of a PNG that are not there.
    """
    if data.startswith(b"\x89PNG"):
        position = 8
        while position + 8 <= len(data) and data[position + 4 : position + 8] != b"IEND":
            position += 12 + int.from_bytes(data[position : position + 4], "big")
        return position + 8 <= len(data)
    if not data.startswith(b"\xff\xd8"):
        return True
    # Skip the header segments: an EXIF thumbnail is a JPEG with its own end marker. From the first
    # scan on, 0xFF 0xD9 is the end marker, because scan data escapes 0xFF. The search starts at the
    # end: from the start it takes a tenth of the time to decode.
    scans = (position for marker, position in jpeg_segments(data) if marker == 0xDA)
    return data.rfind(b"\xff\xd9", next(scans, len(data))) >= 0


def _jpeg(data: bytes) -> tuple[int, int]:
    frames = (at for marker, at in jpeg_segments(data) if marker & 0xF0 == 0xC0
              and marker not in (0xC4, 0xC8, 0xCC))  # fmt: skip
    height, width = struct.unpack_from(">HH", data, next(frames) + 5)
    return width, height


def _bmp(data: bytes) -> tuple[int, int]:
    return struct.unpack_from("<HH" if data[14] == 12 else "<ii", data, 18)


def _webp(data: bytes) -> tuple[int, int]:
    if data[12:16] == b"VP8X":
        numbers = data[24:27], data[27:30]
        return tuple(int.from_bytes(number, "little") + 1 for number in numbers)
    if data[12:16] == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return tuple(side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))


def _tiff(data: bytes) -> tuple[int, int]:
    order, big = "<" if data[:1] == b"I" else ">", 43 in data[2:4]
    (start,) = struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4)
    (count,) = struct.unpack_from(order + ("Q" if big else "H"), data, start)
    sides = {}
    for n in range(count):
        at = start + (8 + 20 * n if big else 2 + 12 * n)
        tag, kind = struct.unpack_from(order + "HH", data, at)
        if tag in (256, 257):
            of_kind = order + {3: "H", 4: "I", 16: "Q"}[kind]
            (sides[tag],) = struct.unpack_from(of_kind, data, at + (12 if big else 8))
        if len(sides) == 2:
            break
    return sides[256], sides[257]


def _boxes(data: bytes, box: bytes) -> tuple[int, int]:
    """Return the largest two numbers that stand in a row behind ``box``."""
    found = (struct.unpack_from(">II", data, each.end()) for each in re.finditer(box, data))
    return max(found, key=lambda sides: sides[0] * sides[1])


_FORMATS = (
    ("JPEG", rb"\xff\xd8", _jpeg),
    ("PNG", rb"\x89PNG", lambda data: struct.unpack_from(">II", data, 16)),
    ("BMP", rb"BM", _bmp),
    ("GIF", rb"GIF8", lambda data: struct.unpack_from("<HH", data, 6)),
    ("TIFF", rb"II[*+]\0|MM\0[*+]", _tiff),
    ("WEBP", rb"RIFF....WEBP", _webp),
    # A grid has a box for each tile, too.
    ("AVIF", rb"....ftyp(avi|mif|msf)", lambda data: _boxes(data, rb"\0\0\0\x14ispe\0{4}")),
    ("JP2", rb"....jP  ", lambda data: _boxes(data, rb"\0\0\0\x16ihdr")[::-1]),
)
