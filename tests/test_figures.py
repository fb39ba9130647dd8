"""docs/figures.py: what is drawn is the rule, and the file is written where asked."""

import cv2
import numpy as np

from docs import figures

# by hand from the rule: layer l reads l - 2^i for every 2^i that divides l, nearest first
LINKS = {1: [0], 2: [1, 0], 3: [2], 4: [3, 2, 0], 5: [4], 6: [5, 4], 7: [6], 8: [7, 6, 4, 0]}


def test_arrows_drawn_are_the_links(monkeypatch):
    arrows, boxes, texts = [], [], []
    monkeypatch.setattr(
        figures.Canvas,
        "arrow",
        lambda self, points, *style: arrows.append((points[0][0], points[-1][0])),
    )
    monkeypatch.setattr(
        figures.Canvas, "box", lambda self, x1, y1, x2, y2, *style, **more: boxes.append((x1, x2))
    )
    monkeypatch.setattr(
        figures.Canvas, "text", lambda self, x, y, text, *style, **more: texts.append(text)
    )
    figures.draw_block(figures.Canvas(1600, 600))

    def box_at(x):
        return next((n for n, (x1, x2) in enumerate(boxes[:9]) if x1 - 3 <= x <= x2 + 3), None)

    drawn = sorted((box_at(end), box_at(start)) for start, end in arrows if box_at(end) is not None)
    assert drawn == sorted((layer, source) for layer in LINKS for source in LINKS[layer])
    widths = (64, 14, 24, 14, 40, 14, 24, 14, 68)
    assert [text for text in texts if text.endswith(" ch")] == [
        *(f"{width} ch" for width in widths),
        "output 124 ch",
    ]


def test_source_maps_and_prior_boxes_are_those_of_ssd512():
    steps = figures.detector_steps()
    assert [step.side for step in steps] == [512, 256, 128, 64, 64, 32, 32, 16, 8, 4, 2, 1]
    assert [step.channels for step in steps] == [3, 64, 128, 256, 320, 640, 640, 512, *[256] * 4]
    assert [step.side for step in steps if step.boxes] == [64, 32, 16, 8, 4, 2, 1]
    assert sum(step.boxes * step.side**2 for step in steps) == 32756
    assert [step.lines[1] for step in steps[6:8]] == ["dilation 4", "3x3 /2, 512"]
    assert steps[-1].lines == ("1x1, 128", "4x4, 256")


def test_script_writes_one_picture_to_the_given_path(tmp_path, capsys):
    path = tmp_path / "new" / "ä.png"
    figures.main(["--out", str(path)])
    picture = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (figures.HEIGHT, figures.WIDTH, 3) and figures.WIDTH == 1600
    assert path.stat().st_size < 300_000
    border = np.concatenate(
        [
            picture[:12].ravel(),
            picture[-12:].ravel(),
            picture[:, :12].ravel(),
            picture[:, -12:].ravel(),
        ]
    )
    assert (border == 255).all()  # nothing is cut off
    assert [p.name for p in path.parent.iterdir()] == ["ä.png"]
    assert capsys.readouterr() == ("", "")


def test_picture_is_the_same_every_time():
    assert np.array_equal(figures.architecture(), figures.architecture())
