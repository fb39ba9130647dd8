"""Reading image files: pixels as OpenCV has them, and every damage by the file's name."""

import struct
import zlib

import cv2
import numpy as np
import pytest
from conftest import with_exif

from data.image import read_image
from utils.errors import UserError


@pytest.fixture
def image():
    yy, xx = np.mgrid[:48, :64]
    return np.stack([xx * 4, yy * 5, np.full_like(xx, 90)], 2).astype(np.uint8)


def encode(suffix, image, *options):
    return cv2.imencode(suffix, image, options)[1].tobytes()


def test_image_is_opencvs_from_a_non_ascii_path_too(tmp_path, image):
    for suffix in (".png", ".bmp", ".jpg"):
        path = tmp_path / f"bläschen 細胞{suffix}"
        path.write_bytes(encode(suffix, image))
        expected = cv2.imread(str(path)) if suffix == ".jpg" else image
        assert np.array_equal(read_image(path), expected)
        assert np.array_equal(read_image(str(path)), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 4])
def test_every_image_becomes_three_channels_of_8_bit(tmp_path, dtype, channels):
    path = tmp_path / "a.png"
    path.write_bytes(encode(".png", np.full((7, 9, channels), 200, dtype)))
    found = read_image(path)
    assert found.shape == (7, 9, 3) and found.dtype == np.uint8


def test_exif_orientation_turns_the_image_unless_asked_not_to(tmp_path, image):
    path = tmp_path / "a.jpg"
    path.write_bytes(with_exif(encode(".jpg", image), orientation=6))
    assert read_image(path).shape == (64, 48, 3)
    assert read_image(path, orient=False).shape == (48, 64, 3)


def huge_png():
    def chunk(kind, data):
        crc = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + crc

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("data", "message"), [
    (None, r"cannot read .*No such file"), (b"", "empty; copy or download"),
    (b"<html>404</html>", "not an image"), (huge_png(), "decode"),
])
def test_file_that_is_no_image_is_refused(tmp_path, data, message):
    path = tmp_path / "a.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"^{path}: .*{message}"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("share", [0.99, 0.6, 0.1])
def test_image_cut_off_is_refused(tmp_path, image, suffix, share):
    data = encode(suffix, image)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=f"^{path}: .*cut off .*; copy or download"):
        read_image(path)


def test_only_the_end_marker_of_the_image_itself_counts(tmp_path, image):
    path = tmp_path / "a.jpg"
    progressive = encode(".jpg", image, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    jpeg = encode(".jpg", image)
    with_thumbnail = with_exif(jpeg, thumbnail=encode(".jpg", image[::4, ::4].copy()))
    for whole, cut in (
        (progressive, progressive[: progressive.rindex(b"\xff\xda")]),  # after a scan
        (with_thumbnail, with_thumbnail[:-40]),
        (jpeg + b"\0" * 40, jpeg[:-2] + b"\0" * 40),
        (jpeg + b"\xff\xda trailer", jpeg[:-2]),
    ):
        path.write_bytes(whole)
        assert read_image(path).shape == (48, 64, 3)
        path.write_bytes(cut)
        with pytest.raises(UserError, match="cut off"):
            read_image(path)
