"""The demo, and the curves of its log."""

from __future__ import annotations

import json

import cv2
import pytest

from demo import run
from docs import curves


def test_curves_are_read_from_the_log_and_drawn(tmp_path):
    log = tmp_path / "log.jsonl"
    records = [{"epoch": e, "loss_loc": 1.0, "loss_conf": 4.0 / e} for e in (1, 2, 3)]
    records[1]["value"] = 0.5
    log.write_text("\n".join(map(json.dumps, [*records, {"step": 9, "value": 0.7}])))
    read = curves.read_log(log)
    assert curves.series(read, "loss").tolist() == [[1, 5], [2, 3], [3, 1 + 4 / 3]]
    assert curves.series(read, "AP").tolist() == [[2, 0.5]]
    out = tmp_path / "c.png"
    assert curves.main([str(out), f"a={log}", f"b={log}"]) == 0
    image = cv2.imread(str(out))
    assert image.shape == (curves.HEIGHT, 2 * curves.WIDTH, 3)
    assert (image == curves.COLOURS[1]).all(2).any()


@pytest.mark.slow
def test_demo_learns_to_detect(tmp_path):
    """The demo as a user runs it: about seven minutes on two cores with bfloat16 instructions."""
    assert run.main(["--output", str(tmp_path)]) == 0
    (results,) = tmp_path.glob("runs/*/*/ss_predict/*/test/results.json")
    assert json.loads(results.read_text())["value"] > 0.35
