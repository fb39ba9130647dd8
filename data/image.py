"""Reading image files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
"""Suffixes of image files, in order of preference; files may have them in any case."""


def read_image(path: str | Path, orient: bool = True) -> np.ndarray:
    """Read an image file as BGR uint8 [H, W, 3], also if it is grey, has alpha or 16 bit.

    orient: whether to apply the EXIF orientation tag, as OpenCV does and so the published code.

    Raises:
        UserError: the file is missing, empty, not an image, or a JPEG or PNG without its end
            marker. Damage before an end marker goes unnoticed: OpenCV fills the missing part,
            mostly with grey.
    """
    try:
        data = Path(path).read_bytes()  # cv2.imread cannot open non-ASCII paths on Windows
    except OSError as error:
        raise UserError(f"{path}: cannot read the image ({error.strerror})") from error
    if not data:
        raise UserError(f"{path}: the image file is empty; copy or download it again")
    if not _is_complete(data):  # OpenCV may fill the missing part and go on
        raise UserError(f"{path}: the image is cut off before its end; copy or download it again")
    flags = cv2.IMREAD_COLOR if orient else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # such as more pixels than OpenCV accepts
        raise UserError(f"{path}: OpenCV cannot decode the image ({error.err})") from error
    if image is None:
        raise UserError(f"{path}: not an image that OpenCV can decode")
    return image


def _is_complete(data: bytes) -> bool:
    """Return whether a JPEG or PNG has its end marker; other formats count as complete."""
    # The search starts at the end: from the start it takes a tenth of the time to decode.
    if data.startswith(b"\x89PNG"):
        return data.rfind(b"IEND") >= 0
    if not data.startswith(b"\xff\xd8"):
        return True
    # Skip the header segments: an EXIF thumbnail is a JPEG with its own end marker. From the first
    # scan on, 0xFF 0xD9 is the end marker, because scan data escapes 0xFF.
    position = data.find(b"\xff", 2)
    while 0 <= position < len(data) - 3:
        marker = data[position + 1]
        if marker == 0xDA:
            return data.rfind(b"\xff\xd9", position) >= 0
        if marker == 0xFF:  # fill byte
            position += 1
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
            position = data.find(b"\xff", position)
    return False
