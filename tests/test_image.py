import struct
import zlib

import cv2
import numpy as np
import pytest
from conftest import with_exif

from data.image import read_image
from utils.errors import UserError


@pytest.fixture
def picture():
    yy, xx = np.mgrid[:48, :64]
    return np.stack([xx * 4, yy * 5, np.full_like(xx, 90)], 2).astype(np.uint8)


def encode(suffix, picture):
    return cv2.imencode(suffix, picture)[1].tobytes()


@pytest.mark.parametrize("suffix", [".png", ".bmp"])
def test_lossless_picture_comes_back_in_bgr_from_a_non_ascii_path(tmp_path, picture, suffix):
    path = tmp_path / f"bläschen 細胞{suffix}"
    path.write_bytes(encode(suffix, picture))
    assert np.array_equal(read_image(path), picture)
    assert np.array_equal(read_image(str(path)), picture)


def test_jpeg_equals_opencv(tmp_path, picture):
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(".jpg", picture))
    assert np.array_equal(read_image(path), cv2.imread(str(path)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 4])
def test_every_picture_becomes_three_channels_of_8_bit(tmp_path, dtype, channels):
    path = tmp_path / "a.png"
    path.write_bytes(encode(".png", np.full((7, 9, channels), 200, dtype)))
    image = read_image(path)
    assert image.shape == (7, 9, 3) and image.dtype == np.uint8


def test_exif_orientation_turns_the_picture_unless_asked_not_to(tmp_path, picture):
    path = tmp_path / "a.jpg"
    path.write_bytes(with_exif(encode(".jpg", picture), orientation=6))
    assert read_image(path).shape == (64, 48, 3)
    assert read_image(path, orient=False).shape == (48, 64, 3)


def test_missing_picture_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no\.jpg: the picture cannot be read \(No such file"):
        read_image(tmp_path / "no.jpg")


def test_empty_picture_is_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"a\.jpg: the picture file is empty"):
        read_image(tmp_path / "a.jpg")


def test_text_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"a\.jpg: not a picture"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("share", [0.99, 0.6, 0.1])
def test_picture_cut_off_is_refused(tmp_path, picture, suffix, share):
    data = encode(suffix, picture)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=r"a\..*cut off before its end"):
        read_image(path)


def test_progressive_jpeg_cut_off_after_a_scan_is_refused(tmp_path, picture):
    data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    read_image(path)
    path.write_bytes(data[: data.rindex(b"\xff\xda")])
    with pytest.raises(UserError, match="cut off"):
        read_image(path)


def test_end_marker_of_an_exif_thumbnail_does_not_count(tmp_path, picture):
    data = encode(".jpg", picture)
    whole = with_exif(data, thumbnail=encode(".jpg", picture[::4, ::4].copy()))
    path = tmp_path / "a.jpg"
    path.write_bytes(whole)
    assert read_image(path).shape == (48, 64, 3)
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="cut off"):
        read_image(path)


@pytest.mark.parametrize("trailer", [b"\0" * 40, b"\xff\xda trailer"])
def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path, picture, trailer):
    path = tmp_path / "a.jpg"
    path.write_bytes(encode(".jpg", picture) + trailer)
    assert read_image(path).shape == (48, 64, 3)


def test_picture_of_absurd_size_is_refused(tmp_path):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match=r"a\.png: .*decode"):
        read_image(path)
