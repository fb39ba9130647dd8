"""Reading image files: pixels as OpenCV has them, and every damage by the file's name."""

import io
import os
import struct
import zlib
from contextlib import suppress

import cv2
import numpy as np
import PIL.Image
import pytest
from conftest import with_exif, write_voc

from data.image import FORMATS, IMAGE_SUFFIXES, MAX_PIXELS, limit_pixels, read_image
from engine.options import Call
from engine.resolve import resolve
from engine.run import open_dataset
from inference.predictor import Predictor
from tools import detect, export, report, sheet
from tools.check import check
from utils.errors import UserError


@pytest.fixture
def image():
    yy, xx = np.mgrid[:48, :64]
    return np.stack([xx * 4, yy * 5, np.full_like(xx, 90)], 2).astype(np.uint8)


def encode(suffix, image, *options):
    return cv2.imencode(suffix, image, options)[1].tobytes()


def pil(kind, image, mode="RGB", **options):
    file = io.BytesIO()
    PIL.Image.fromarray(image[:, :, ::-1]).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(autouse=True)
def limit(monkeypatch):
    monkeypatch.setenv("SSD_MAX_PIXELS", str(MAX_PIXELS))


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
    (b"<html>404</html>", "not an image"),
    (huge_png(), r"60000 x 60000, more than 134,217,728 pixels.*--max_pixels 3600000000")])
def test_file_that_is_no_image_is_refused(tmp_path, data, message):
    path = tmp_path / "a.png"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"^{path}: .*{message}"):
        read_image(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("share", [0.99, 0.6, 0.1])
def test_image_cut_off_is_refused(tmp_path, image, kind, share):
    data = pil(kind, image)
    path = tmp_path / "a"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=f"^{path}: .*(cut off .*; copy or download|copy this)"):
        read_image(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_every_format_is_read_and_its_size_known_before(tmp_path, image, kind, mode, monkeypatch):
    path, suffix = tmp_path / "a", f".{kind.lower()}"
    assert suffix in IMAGE_SUFFIXES
    try:
        data = pil(kind, image, mode)
    except (OSError, ValueError):
        pytest.skip("Pillow does not write this mode")
    path.write_bytes(data)
    assert read_image(path).shape == (48, 64, 3)
    if mode == "RGB" and kind != "GIF":  # which has a palette
        assert np.abs(read_image(path).astype(int) - image).mean() < 4
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    limit_pixels(48 * 64)
    with pytest.raises(UserError, match=f"can decode; copy this {kind} again"):
        read_image(path)
    monkeypatch.setattr(cv2, "haveImageWriter", lambda name: name != suffix)
    with pytest.raises(UserError, match=f"^{path}: .*it has no {kind}; convert"):
        read_image(path)
    limit_pixels(48 * 64 - 1)
    with pytest.raises(UserError, match=f"^{path}: .*64 x 48, more than 3,071 .*--max_pixels 3072"):
        read_image(path)


def test_a_png_cannot_claim_more_memory_than_it_fills(tmp_path, image):
    png = encode(".png", image)
    (tmp_path / "a.png").write_bytes(png.replace(png[33:37], b"\xee\xee\xee\xee", 1))
    with pytest.raises(UserError, match="cut off"):  # OpenCV would make room for 4 GB
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG", "AVIF"])
def test_of_several_images_in_a_file_the_first_is_read(tmp_path, image, kind):
    (tmp_path / "a").write_bytes(pil(kind, image, save_all=True,
                                     append_images=[PIL.Image.new("RGB", (64, 48), "red")]))
    (tmp_path / "b").write_bytes(pil(kind, image))
    both = [read_image(tmp_path / name).astype(int) for name in "ab"]
    assert np.abs(both[0] - both[1]).mean() < 4


def test_every_command_that_reads_images_takes_the_limit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for most, command, words in (("5", sheet, "none"), ("6", report, "none"),
                                 ("7", detect, "none.pth none.jpg"),
                                 ("8", export, "none.pth --format onnx")):
        assert command.main([*words.split(), "--max-pixels", most]) == 2
        assert os.environ["SSD_MAX_PIXELS"] == most
    root = write_voc(tmp_path / "own", {"trainval": {"a": [("dog", (1, 1, 50, 50))]}})
    for most, read in (
            (9, lambda options: open_dataset(options, Call(), "train_sets").pull_image(0)),
            (10, check),
            (11, lambda options: Predictor("none.pth", max_pixels=options.max_pixels))):
        with suppress(UserError):
            read(resolve({"root": str(root), "max_pixels": most}))
        with pytest.raises(UserError, match=f"a.jpg: the image is 96 x 72, more than {most} "):
            read_image(root / "JPEGImages/a.jpg")


def test_only_the_end_marker_of_the_image_itself_counts(tmp_path, image):
    path = tmp_path / "a.jpg"
    progressive = encode(".jpg", image, cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
    jpeg = encode(".jpg", image)
    with_thumbnail = with_exif(jpeg, thumbnail=encode(".jpg", image[::4, ::4].copy()))
    for whole, cut in (
            (progressive, progressive[: progressive.rindex(b"\xff\xda")]),  # after a scan
            (with_thumbnail, with_thumbnail[:-40]),
            (jpeg + b"\0" * 40, jpeg[:-2] + b"\0" * 40),
            (jpeg + b"\xff\xda trailer", jpeg[:-2])):
        path.write_bytes(whole)
        assert read_image(path).shape == (48, 64, 3)
        path.write_bytes(cut)
        with pytest.raises(UserError, match="cut off"):
            read_image(path)
