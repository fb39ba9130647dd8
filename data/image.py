"""Reading image files."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from utils.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")  # in order of preference, any case


def read_image(path: str | Path, orient: bool = True) -> np.ndarray:
    """Read a picture: BGR uint8 [H, W, 3], whatever the file holds (grey, alpha, 16 bit).

    `orient` applies the EXIF orientation tag: OpenCV's default and so the published behaviour.
    Raises UserError naming the file when it is missing, empty, no picture, or cut off (a JPEG or
    PNG without its end marker). Not noticed is what has lost or damaged data before an end marker,
    such as half a file that was closed properly: OpenCV fills the missing part, mostly with grey.
    """
    try:
        data = Path(path).read_bytes()  # cv2.imread cannot open non-ASCII paths on Windows
    except OSError as error:
        raise UserError(f"{path}: the picture cannot be read ({error.strerror})") from error
    if not data:
        raise UserError(f"{path}: the picture file is empty; copy or download it again")
    if not _is_complete(data):  # OpenCV may fill the missing part and go on
        raise UserError(f"{path}: the picture is cut off before its end; copy or download it again")
    flags = cv2.IMREAD_COLOR if orient else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:  # such as more pixels than OpenCV accepts
        raise UserError(f"{path}: OpenCV cannot decode the picture ({error.err})") from error
    if image is None:
        raise UserError(f"{path}: not a picture that OpenCV can decode")
    return image


def _is_complete(data: bytes) -> bool:
    """Whether a JPEG or PNG reaches its end marker; other formats count as complete."""
    # Searched from the end, where it is: from the start takes a tenth of the time to decode.
    if data.startswith(b"\x89PNG"):
        return data.rfind(b"IEND") >= 0
    if not data.startswith(b"\xff\xd8"):
        return True
    # Skip the header segments: an EXIF thumbnail is a JPEG with an end marker of its own.
    # From the first scan on, 0xFF 0xD9 is the end marker, because scan data escapes 0xFF.
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
