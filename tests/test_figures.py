"""docs/figures.py: what is drawn is the rule, and the file is written where asked."""

import cv2
import numpy as np

from docs import figures

# by hand from the rule: layer l reads l - 2^i for every 2^i that divides l, nearest first
LINKS = {1: [0], 2: [1, 0], 3: [2], 4: [3, 2, 0], 5: [4], 6: [5, 4], 7: [6], 8: [7, 6, 4, 0]}


def test_arrows_drawn_are_the_links(monkeypatch):
    arrows, boxes, texts = [], [], []
    calls = {
        "arrow": lambda self, points, *_, **more: arrows.append((points[0][0], points[-1][0])),
        "box": lambda self, x1, y1, x2, y2, *_, **more: boxes.append((x1, x2)),
        "text": lambda self, x, y, text, *_, **more: texts.append(text),
    }
    for name, call in calls.items():
        monkeypatch.setattr(figures.Canvas, name, call)
    figures.draw_block(figures.Canvas(1600, 600))

    def box_at(x):
        return next((n for n, (x1, x2) in enumerate(boxes[:9]) if x1 - 3 <= x <= x2 + 3), None)

    drawn = sorted((box_at(end), box_at(start)) for start, end in arrows if box_at(end) is not None)
    assert drawn == sorted((layer, source) for layer in LINKS for source in LINKS[layer])
    widths = (64, 14, 24, 14, 40, 14, 24, 14, 68)
    channels = [f"{width} ch" for width in widths]
    assert [text for text in texts if text.endswith(" ch")] == [*channels, "output 124 ch"]


def test_source_maps_and_prior_boxes_are_those_of_ssd512():
    steps = figures.detector_steps()
    assert [step.side for step in steps] == [512, 256, 128, 64, 64, 32, 32, 16, 8, 4, 2, 1]
    assert [step.channels for step in steps] == [3, 64, 128, 256, 320, 640, 640, 512, *[256] * 4]
    assert [step.side for step in steps if step.boxes] == [64, 32, 16, 8, 4, 2, 1]
    assert sum(step.boxes * step.side**2 for step in steps) == 32756
    assert steps[-1].lines == ("1x1, 128", "4x4, 256")


def test_the_image_is_that_of_the_readme(tmp_path):
    path = tmp_path / "new" / "ä.png"
    figures.main(["--out", str(path)])
    image, kept = (cv2.imdecode(np.frombuffer(p.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
                   for p in (path, figures.OUT))  # fmt: skip
    assert image.shape == kept.shape == (figures.HEIGHT, figures.WIDTH, 3)
    assert np.abs(image.astype(int) - kept).mean() < 3  # fonts differ by version
    image[12:-12, 12:-12] = 255
    assert (image == 255).all()  # nothing is cut off
