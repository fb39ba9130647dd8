"""Reading image files."""

import functools
import io
import os
import warnings
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from utils.errors import UserError, first_line
from utils.files import read_bytes

IMAGE_SUFFIXES = (*".jpg .jpeg .png .bmp .webp .tif .tiff .gif .avif .jfif".split(),)
"""Suffixes of image files, in order of preference; files may have them in any case."""
MAX_PIXELS = 2**27
"""Most pixels of an image unless ``limit_pixels`` is called: 400 MB decoded."""
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "AVIF")  # Pillow's names, and suffixes
_VARIABLE = "SSD_MAX_PIXELS"  # of the environment, which processes that load images inherit


def limit_pixels(most: int | None) -> None:
    """Set the most pixels of an image in this process and those it starts; None changes nothing."""
    if most is not None:
        os.environ[_VARIABLE] = str(most)


def check_pixels(path: object, size: tuple[int, int]) -> None:
    """Raise UserError if an image of this (width, height) has more pixels than are allowed."""
    limit, pixels = os.environ.get(_VARIABLE, ""), size[0] * size[1]
    if pixels > (most := int(limit) if limit.isdecimal() else MAX_PIXELS):
        raise UserError(f"{path}: the image is {size[0]} x {size[1]}, more than {most:,} pixels; "
                        f"make it smaller, or allow it with --max_pixels {pixels}")


def read_image(path: str | Path, orient: bool = True) -> np.ndarray:
    """Read an image file as BGR uint8 [H, W, 3], also if it is grey, has alpha or 16 bit.

    Alpha is dropped, 16 bit lose the lower 8, and of several images in a file the first is read.

    orient: whether to apply the EXIF orientation tag, as OpenCV does and so the published code.

    Raises:
        UserError: the file is missing, no regular file, empty, not an image, too large (see
            ``limit_pixels``), or cut off. Damage before the end of a JPEG goes unnoticed: OpenCV
            fills the missing part, mostly with grey.
    """
    data = read_bytes(path, "image", 2**30)  # cv2.imread cannot open non-ASCII paths on Windows
    if not data:
        raise UserError(f"{path}: the image file is empty; copy or download it again")
    if not _is_complete(data):  # OpenCV fills a JPEG, and makes room for what a PNG promises
        raise UserError(f"{path}: the image is cut off before its end; copy or download it again")
    kind, size = _header(data)
    check_pixels(path, size)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # told below
    flags = cv2.IMREAD_COLOR if orient else cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        image, fault = cv2.imdecode(np.frombuffer(data, np.uint8), flags), ""
    except Exception as error:  # such as more pixels than OpenCV accepts, or no memory for them
        image, fault = None, f" ({first_line(error)})"
    if image is not None:
        return image
    fix = f"copy this {kind or 'file'} again, or convert it to PNG of 8 bit"
    if kind and not cv2.haveImageWriter(f".{kind.lower()}"):  # formats are built in both ways
        fix = f"it has no {kind}; convert the image, or pip install -U opencv-python-headless"
    raise UserError(f"{path}: not an image that OpenCV {cv2.__version__} can decode{fault}; {fix}")


def image_size(path: Path) -> tuple[int, int]:
    """Return (width, height) of an image as `read_image` turns it.

    The header tells. Only an image that Pillow does not know, or one that is no JPEG but has an
    orientation, is decoded. Raises UserError for what is no image.
    """
    with suppress(Exception), warnings.catch_warnings():  # OpenCV decides what is an image
        warnings.simplefilter("ignore")
        if path.is_file():
            with Image.open(path) as image:
                tagged = image.format != "PNG" or "exif" in image.info  # else it is decoded
                if not (tagged and image.getexif().get(0x0112, 1) > 4):
                    return image.size
                if image.format in ("JPEG", "MPO"):
                    return image.size[::-1]
    height, width, _ = read_image(path).shape
    return width, height


def _header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Return Pillow's format and (width, height) without decoding; ("", (0, 0)) if unknown."""
    if data.startswith(b"\x89PNG"):  # of which OpenCV takes headers that Pillow refuses
        return "PNG", (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"))
    # Not Image.open, which has a limit of its own that only all of a process can change.
    for kind, (factory, accept) in _openers().items():
        if accept(data[:16]) is True:
            try:
                return kind, factory(io.BytesIO(data), "").size
            except Exception:  # a damaged header, which OpenCV may read
                return kind, (0, 0)
    return "", (0, 0)


@functools.cache
def _openers() -> dict[str, tuple]:
    Image.init()
    warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")
    return {kind: Image.OPEN[kind] for kind in FORMATS if kind in Image.OPEN}


def _is_complete(data: bytes) -> bool:
    """Return whether a JPEG or PNG has its end marker; other formats count as complete."""
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
