"""Tiles and mirrored images: where views lie, and how their detections become those of an image."""

import numpy as np
import pytest
import torch

from inference.predictor import Predictor
from inference.views import View, Views, merge
from layers import Detect
from models import build_net
from tools.detect import open_predictor, parse
from utils.errors import UserError

DETECT = Detect(conf_thresh=0.1)


def found(*rows):
    """Detections from rows of x1, y1, x2, y2, score, label."""
    table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
    return {"boxes": table[:, :4], "scores": table[:, 4], "labels": table[:, 5].long()}


def rows(detections):
    columns = (detections["boxes"], detections["scores"][:, None], detections["labels"][:, None])
    return torch.cat(columns, 1).round(decimals=4).tolist()


@pytest.mark.parametrize(("width", "height", "overlap"), [
    (1000, 700, 0.2), (301, 300, 0), (5000, 90, 0.5), (300, 900, 0.9),
])
def test_tiles_cover_the_image_and_overlap(width, height, overlap):
    image = np.zeros((height, width, 3), np.uint8)
    whole, *tiles = Views(300, overlap).of(image)
    assert whole.image is image
    seen = np.zeros((height, width), int)
    for tile in tiles:
        h, w = tile.image.shape[:2]
        assert (h, w) == (min(300, height), min(300, width))
        seen[tile.top : tile.top + h, tile.left : tile.left + w] += 1
    assert seen.min() >= 1
    starts = sorted({tile.left for tile in tiles})
    assert all(b - a <= 300 * (1 - overlap) + 1 for a, b in zip(starts, starts[1:], strict=False))


def test_an_image_that_fits_is_seen_once_and_mirrored_twice():
    image = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert len(Views(300).of(image)) == len(Views().of(image)) == 1
    _, mirrored = Views(flip=True).of(image)
    assert (mirrored.image == image[:, ::-1]).all()
    assert mirrored.place(torch.tensor([[0.0, 1, 1, 2]])).tolist() == [[2, 1, 3, 2]]
    for wrong in ((-1, 0.2), (300, 1), (300, -0.1)):
        with pytest.raises(UserError, match=str(wrong[0])):
            Views(*wrong)


def test_one_view_is_returned_as_it_is():
    given = found((0, 0, 9, 9, 0.05, 1), (0, 0, 9, 9, 0.5, 1))
    assert merge(Views().of(np.zeros((9, 9, 3), np.uint8)), [given], DETECT) is given


def test_boxes_that_a_tile_cuts_off_yield_to_whole_ones_of_their_class():
    views = [View(np.zeros((100, 160, 3), np.uint8), 0, 0, False)]
    views += [View(np.zeros((100, 100, 3), np.uint8), left, 0, False) for left in (0, 60)]
    per_view = [
        found(),
        # An object at 80..120, cut off at 100; one of another class at the same place, seen here
        # alone; and one at the image's own edge, which does not cut.
        found((80, 20, 100, 60, 0.9, 1), (82, 20, 100, 60, 0.6, 2), (0, 0, 10, 10, 0.8, 1)),
        found((20, 20, 60, 60, 0.7, 1), (90, 80, 100, 100, 0.5, 3)),
    ]
    assert rows(merge(views, per_view, DETECT)) == [
        pytest.approx([0, 0, 10, 10, 0.8, 1]), pytest.approx([80, 20, 120, 60, 0.7, 1]),
        pytest.approx([82, 20, 100, 60, 0.6, 2]), pytest.approx([150, 80, 160, 100, 0.5, 3]),
    ]


def test_the_same_box_of_several_views_is_one():
    image = np.zeros((50, 50, 3), np.uint8)
    views = Views(flip=True).of(image)
    given = [found((10, 10, 20, 30, 0.6, 1)), found((30, 10, 40, 30, 0.9, 1))]
    assert rows(merge(views, given, DETECT)) == [pytest.approx([10, 10, 20, 30, 0.9, 1])]
    assert rows(merge(views, [found(), found()], DETECT)) == []


@pytest.fixture
def checkpoint(tmp_path, tiny):
    torch.manual_seed(0)
    config = {"version": "tiny", "size": 300, "dataset": "VOC", "priors": "VOC"}
    saved = {"model": build_net("tiny", 300, 3).state_dict(), "classes": ["a", "b"]}
    torch.save({**saved, "config": config}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_a_predictor_sees_what_it_sees_in_each_part(checkpoint):
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    plain, tiled = Predictor(checkpoint), Predictor(checkpoint, tiles=300, flip=True)
    views = tiled.views.of(image)
    assert len(views) == 6 and (plain.views, tiled.views) == (Views(), Views(300, flip=True))
    parts = plain([view.image for view in views])
    expected = merge(views, parts, plain.detect)
    small = image[:, :300]
    both = tiled([image, small])
    assert rows(both[0]) == rows(expected) and len(both[0]["names"]) == len(expected["labels"])
    one = Predictor(checkpoint, tiles=300)(small)
    assert rows(one) == rows(plain(small)) and len(one["labels"]) > 0


def test_the_command_line_gives_the_views(checkpoint):
    line = [str(checkpoint), "x.jpg", "--tiles", "400", "--overlap", "0.5", "--flip"]
    assert open_predictor(parse(line)).views == Views(400, 0.5, True)
    assert open_predictor(parse(line[:2])).views == Views()
