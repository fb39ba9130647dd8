"""Drawn images, looked at by their pixels."""

from pathlib import Path

import cv2
import matplotlib
import numpy as np
import pytest

from data.judge import found_of, judge
from data.truth import Truth
from data.voc0712 import VOCDetection
from inference import draw
from utils.errors import UserError

FONT_FILE = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


def shows(image, colour):
    return bool((image == colour).all(axis=2).any())


def dets(boxes=(), scores=(), labels=()):
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    return {"boxes": boxes, "scores": np.float32(scores), "labels": np.int64(labels)}


def judged(target, detections):
    """One image; target: rows of box, label and whether it is ignored."""
    rows = np.array(target, float).reshape(-1, 6)
    truth = Truth(np.zeros(len(rows), int), rows[:, :4] + (0, 0, 1, 1), rows[:, 4].astype(int),
                  rows[:, 5] > 0, "voc")
    return judge(truth, found_of([detections], ["one"], 9))


@pytest.mark.parametrize("height, width, ground", [
    (16, 16, 0), (1, 1, 128), (3, 200, 255), (48, 30, 128), (300, 500, 0)])
def test_every_size_and_ground_keeps_shape_dtype_and_input(height, width, ground):
    image = np.full((height, width, 3), ground, np.uint8)
    boxes = [[width * 0.2, height * 0.3, width * 0.8, height * 0.9], [-1e9, -5, 1e12, height + 40]]
    names = ["so long a name that no image has the room for it" * 3, "20°"]
    for scores, font in ((None, None), ([0.3, 0.99], draw.find_font([], FONT_FILE))):
        out = draw.draw_detections(image, np.array(boxes), [1, 2], scores, names, font)
        assert out.shape == image.shape and out.dtype == np.uint8
        assert (image == ground).all()
        assert not np.shares_memory(out, image)
        assert (out != image).any()


def test_no_boxes_gives_an_equal_copy():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    nothing = draw.draw_detections(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    for out in (nothing, draw.draw_comparison(image, judged([], dets()), 0)):
        assert (out == image).all() and not np.shares_memory(out, image)


def test_read_only_and_sliced_images_are_accepted():
    image = np.full((60, 80, 3), 90, np.uint8)[:, ::-1]
    image.flags.writeable = False
    assert shows(draw.draw_detections(image, [[10, 20, 50, 50]], [1]), draw.class_colour(1))


def test_outline_lies_on_the_box_and_the_inside_is_free():
    image = np.full((200, 200, 3), 255, np.uint8)
    out = draw.draw_detections(image, [[60, 80, 150, 170]], [3])
    colour = np.array(draw.class_colour(3))
    for x, y in ((60, 120), (150, 120), (105, 170), (120, 80)):
        assert (out[y, x] == colour).all()
    assert (out[90:160, 70:140] == 255).all()
    changed = np.nonzero((out != image).any(axis=2))
    assert changed[0].max() <= 172 and changed[1].max() <= 152 and changed[1].min() >= 58


@pytest.mark.parametrize("box", [[0, 0, 40, 30], [170, 150, 199, 199], [-50, -50, 400, 400]])
def test_label_stays_inside_the_image(box):
    image = np.full((200, 200, 3), 200, np.uint8)

    def tag(box):
        drawn = draw.draw_detections(image, [box], [1], [0.5], ["rhinoceros"])
        filled = (drawn == draw.class_colour(1)).all(axis=2).astype(np.uint8)
        filled = cv2.morphologyEx(filled, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))  # no lines
        return np.ptp(np.nonzero(filled), axis=1)

    assert tag(box) == pytest.approx(tag([60, 80, 150, 170]), abs=2)


def test_best_score_lies_on_top():
    image = np.zeros((100, 100, 3), np.uint8)
    box = [[20, 40, 80, 90]] * 2
    a = draw.draw_detections(image, box, [1, 2], [0.2, 0.8])
    b = draw.draw_detections(image, box[::-1], [2, 1], [0.8, 0.2])
    assert (a == b).all()
    assert (a[90, 50] == draw.class_colour(2)).all()


def test_label_colours_are_stable_and_distinct_and_text_contrasts():
    colours = np.array([draw.class_colour(k) for k in range(1, 81)], float)
    gaps = np.linalg.norm(colours[:, None] - colours[None], axis=2)
    assert gaps[np.triu_indices(80, 1)].min() > 8
    assert gaps[:20, :20][np.triu_indices(20, 1)].min() > 40
    for label in range(1, 21):
        image = np.full((300, 300, 3), 128, np.uint8)
        drawn = draw.draw_detections(image, [[50, 100, 290, 290]], [label], names=["WWWW"] * 20)
        weights = (0.114, 0.587, 0.299)
        luminance = np.dot(draw.class_colour(label), weights)
        text = drawn[80:98, 55:80].reshape(-1, 3) @ weights
        assert np.abs(text - luminance).max() > 100


def test_without_a_font_what_is_not_ascii_is_drawn_as_escapes():
    image = np.zeros((120, 160, 3), np.uint8)

    def drawn(name):
        return draw.draw_detections(image, [[20, 40, 120, 100]], [1], names=[name])

    assert (drawn("café") == drawn(r"caf\xe9")).all()
    assert (drawn("猫") == drawn(r"\u732b")).all()
    assert (drawn("a\u2028\t b") == drawn("a b")).all()
    assert (drawn("a") != drawn("b")).any()
    assert (drawn("") != image).any()
    assert (draw.draw_detections(image, [[20, 40, 120, 100]], [7]) ==
            draw.draw_detections(image, [[20, 40, 120, 100]], [7], names=["7"] * 7)).all()


def test_a_font_draws_what_it_has_beyond_ascii():
    image, font = np.full((300, 400, 3), 128, np.uint8), draw.find_font([], FONT_FILE)
    drawn = [draw.draw_detections(image, [[80, 90, 320, 270]], [1], names=[name], font=font)
             for name in ("20°", "20", r"20\xb0")]
    assert (drawn[0] != drawn[1]).any() and (drawn[0] != drawn[2]).any()


def test_the_font_is_the_given_one_or_the_one_that_has_most_of_the_text(monkeypatch):
    own = draw.find_font(["plain"])
    monkeypatch.setattr("inference.draw.FONT_FILES", ("nowhere.ttf", str(FONT_FILE)))
    assert draw.find_font(["plain"]) is own
    for font in (draw.find_font(["20é"]), draw.find_font(["plain"], FONT_FILE)):
        assert font.path == str(FONT_FILE)
    assert draw.escape("20é 猫", draw.find_font(["20é"])) == r"20é \u732b"
    monkeypatch.setattr("inference.draw.FONT_FILES", ())
    assert draw.find_font(["20é"]) is own and draw.escape("20é", own) == r"20\xe9"


def test_a_file_that_is_no_font_is_told(tmp_path):
    (tmp_path / "a.ttf").write_text("no font")
    for name in ("a.ttf", "none.ttf"):
        with pytest.raises(UserError, match=rf"{name} .*\.ttf"):
            draw.find_font(["a"], tmp_path / name)


@pytest.mark.parametrize("change, said", [
    ({"labels": [1, 2]}, "longer"),
    ({"scores": []}, "shorter"),
    ({"image": np.zeros((10, 10, 3), np.float32)}, r"uint8 \[H, W, 3\], not float32 \[10, 10"),
    ({"image": np.zeros((10, 10), np.uint8)}, r"not uint8 \[10, 10\]"),
    ({"boxes": [[1, np.nan, 5, 5]]}, "NaN"),
    *(({"labels": [label]}, f"label {label} .* 2 names") for label in (-1, 0, 3))])
def test_wrong_arguments_are_named(change, said):
    good = {"image": np.zeros((10, 10, 3), np.uint8), "boxes": [[1, 1, 5, 5]], "labels": [1]}
    with pytest.raises(ValueError, match=said):
        draw.draw_detections(**{**good, "names": ("cat", "dog"), **change})


@pytest.mark.parametrize("there, ignored, found, colours", [
    (True, False, True, {draw.GREEN}), (True, False, False, {draw.ORANGE}),
    (False, False, True, {draw.RED}), (True, True, True, {draw.GREY}),
    (True, True, False, {draw.GREY})])
def test_comparison_shows_the_judgement_by_colour(there, ignored, found, colours):
    image = np.full((200, 200, 3), 250, np.uint8)
    box = [60, 60, 140, 140]
    target = [[*box, 2, ignored]] if there else []
    detections = dets([box, box], [0.9, 0.1], [2, 2]) if found else dets([box], [0.1], [2])
    out = draw.draw_comparison(image, judged(target, detections), 0, ("cat", "dog"))
    assert {c for c in (draw.GREEN, draw.RED, draw.ORANGE, draw.GREY) if shows(out, c)} == colours
    assert (image == 250).all()
    side = (out[75:125, 140] == next(iter(colours))).all(axis=1)
    assert side.all() if found else 0.2 < side.mean() < 0.8  # solid, or dashed


def test_comparison_is_of_one_image_and_of_detections_of_the_score():
    image, box = np.full((200, 200, 3), 250, np.uint8), [60, 60, 140, 140]
    both = judged([[*box, 1, False]], dets([box], [0.4], [1]))
    assert (draw.draw_comparison(image, both, 1) == image).all()
    assert shows(draw.draw_comparison(image, both, 0), draw.ORANGE)
    assert shows(draw.draw_comparison(image, both, 0, score=0.4), draw.GREEN)


def test_examples_do_not_miss_difficult_objects(tmp_path, make_voc):
    objects = [("cat", (20, 20, 60, 60), True)]
    root = make_voc(tmp_path / "data", {"test": {f"p{i}": objects for i in range(10)}})
    sheet = draw.draw_examples(VOCDetection(root, [(None, "test")]), [dets()] * 10, 4)
    assert sheet.shape[1] > 4 * 320 and sheet.shape[0] < 2 * 320
    assert shows(sheet, draw.GREY) and not shows(sheet, draw.ORANGE)


def test_contact_sheet_letterboxes_in_reading_order():
    kinds = (((50, 100, 3), 10), ((100, 50, 3), 60), ((7, 7, 3), 110))
    images = [np.full(shape, value, np.uint8) for shape, value in kinds]
    sheet = draw.contact_sheet(images, 2, (80, 60))
    assert sheet.dtype == np.uint8 and sheet.shape == (2 * 68 + 8, 2 * 88 + 8, 3)
    for value, size, centre in ((10, (80, 40), (48, 38)), (60, (30, 60), (136, 38)),
                                (110, (60, 60), (48, 106))):
        ys, xs = np.nonzero((sheet == value).all(axis=2))
        assert (np.ptp(xs) + 1, np.ptp(ys) + 1) == size
        assert ((xs.min() + xs.max() + 1) / 2, (ys.min() + ys.max() + 1) / 2) == centre


def test_captions_are_written_below_the_cells():
    images = [np.full((40, 40, 3), 120, np.uint8)] * 3
    plain = draw.contact_sheet(images, 3, (60, 40))
    assert plain.shape == (40 + 16, 3 * 68 + 8, 3)
    sheet = draw.contact_sheet(images, 3, (60, 40), ["ok", "a caption too long for its cell", ""])
    assert sheet.shape == (40 + 26 + 16, 3 * 68 + 8, 3)
    assert (sheet[:48] == plain[:48]).all()
    ink = (sheet[48:] != 236).any(axis=(0, 2))
    assert ink[8:68].any() and ink[76:136].any()
    assert not ink[68:76].any() and not ink[136:].any()


def test_small_images_are_enlarged_with_their_boxes():
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:30, 10:50] = 255
    larger, boxes = draw.enlarge(image, np.array([[10, 10, 49, 29]]))
    assert larger.shape == (280, 420, 3) and boxes.tolist() == [[70, 70, 349, 209]]
    ys, xs = np.nonzero(larger[..., 0] > 127)
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == tuple(boxes[0])
    for shape in ((draw.LEGIBLE, 400, 3), (3, 2000, 3), (5000, 100, 3)):
        image = np.zeros(shape, np.uint8)
        assert draw.enlarge(image, boxes)[0] is image
    assert draw.enlarge(np.zeros((1, 1, 3), np.uint8), np.zeros((0, 4)))[0].shape[0] >= draw.LEGIBLE


@pytest.mark.parametrize("ground", [0, 128, 255])
def test_a_caption_stands_in_the_upper_left_corner_of_any_image(ground):
    image = np.full((100, 200, 3), ground, np.uint8)
    draw.draw_caption(image, "25.0 fps")
    assert (image[:12, :60] == 0).any() and (image[:15, :60] > 200).any()
    assert (image[20:] == ground).all()
