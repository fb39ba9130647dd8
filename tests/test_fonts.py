"""Names in any script on pictures."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from inference import fonts
from inference.draw import draw_detections
from inference.fonts import Lettering
from utils.errors import UserError


@pytest.fixture
def without_fonts(monkeypatch, tmp_path):
    """A machine with an OpenCV before 5 and no fonts."""
    monkeypatch.delattr(cv2, "FontFace", raising=False)
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))


@pytest.fixture
def font_file(tmp_path_factory):
    """A font of Latin letters that is always there: Pillow's own."""
    from PIL import ImageFont

    path = tmp_path_factory.mktemp("fonts") / "own.ttf"
    font = ImageFont.load_default(20).path
    path.write_bytes(font.getvalue() if hasattr(font, "getvalue") else font.read())
    return path


def test_a_line_has_the_height_asked_for_and_the_width_of_its_text():
    letters = Lettering(["猫", "кошка"])
    for text in ("猫", "кошка 0.97", "cat"):
        for height in (1, 9, 40):
            mask = letters.mask(text, height)
            assert mask.dtype == np.uint8 and mask.shape[0] == height
        assert mask.max() > 200
        assert mask.shape[1] < letters.mask(text + " and more", 40).shape[1]
    for nothing in ("", " \n"):
        assert letters.mask(nothing, 12).shape == (12, 1)
    assert np.array_equal(letters.mask(" a\u2028\tb ", 12), letters.mask("a b", 12))


@pytest.mark.skipif(not hasattr(cv2, "FontFace"), reason="OpenCV 5 brings fonts")
def test_opencv_5_needs_no_other_font(monkeypatch, tmp_path):
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path),))
    letters = Lettering(["Straße", "Ελληνικά", "Кошка", "猫", "ネコ", "고양이", "Việt"])
    assert letters.missing == ""
    drawn = [letters.mask(text, 30) for text in ("猫", "汽", "K", "?")]
    assert len({mask.tobytes() for mask in drawn}) == 4
    # It would write them from the wrong side.
    assert Lettering(["חתול"]).missing == "".join(sorted(set("חתול")))


def test_what_no_font_has_is_told_and_becomes_a_question_mark(without_fonts):
    letters = Lettering(["猫 cat", "café"])
    assert letters.missing == "é猫"
    assert np.array_equal(letters.mask("猫 cat", 20), letters.mask("? cat", 20))
    assert Lettering(["plain"]).missing == ""


def test_a_font_that_is_given_serves(without_fonts, font_file):
    letters = Lettering(["20°"], font_file)
    assert letters.missing == ""
    assert not np.array_equal(letters.mask("20°", 40), letters.mask("20?", 40))
    assert Lettering(["猫"], font_file).missing == "猫"


def test_fonts_of_the_system_are_found(without_fonts, font_file, monkeypatch):
    (font_file.parent / "damaged.ttf").write_bytes(b"no font")
    monkeypatch.setattr(fonts, "FOLDERS", ("/nowhere", str(font_file.parent)))
    letters = Lettering(["20°"])
    assert letters.missing == ""
    # A word is in one hand: that which has all of it, its ASCII letters too.
    assert np.array_equal(letters.mask("20°", 40), Lettering([], font_file).mask("20°", 40))


def test_a_file_that_is_no_font_is_told(tmp_path):
    (tmp_path / "a.ttf").write_text("no font")
    for name in ("a.ttf", "none.ttf"):
        with pytest.raises(UserError, match=rf"{name} cannot be used as a font .*give a \.ttf"):
            Lettering(["a"], tmp_path / name)


@pytest.mark.parametrize("height, width", [(300, 400), (12, 20), (1, 1)])
def test_names_are_drawn_on_every_picture(height, width):
    image = np.full((height, width, 3), 128, np.uint8)
    box = [[width * 0.2, height * 0.3, width * 0.8, height * 0.9]]
    names = ("кошка", "Кот с очень длинным именем, которое никуда не помещается" * 3)
    letters = Lettering(names)
    drawn = [draw_detections(image, box, [k], [0.5], names, letters) for k in (1, 2)]
    assert all(d.shape == image.shape and d.dtype == np.uint8 for d in drawn)
    assert (image == 128).all()
    if height > 100:
        ascii_only = draw_detections(image, box, [1], [0.5], names)
        assert (drawn[0] != ascii_only).any()
    # ASCII names are drawn as without.
    plain = draw_detections(image, box, [1], [0.5], ("cat",), letters)
    assert np.array_equal(plain, draw_detections(image, box, [1], [0.5], ("cat",)))
