"""The benchmarks, tiny: they run, compare what they say, and notice a wrong result."""

import json
import re

import pytest
import torch

from benchmarks import coco_eval, detect, nms, timing, voc_eval

CPU = torch.device("cpu")


def test_medians_take_turns_and_leave_the_warm_up_out(monkeypatch):
    clock = iter([0, 9, 9, 18, 18, 20, 20, 21, 21, 25, 25, 28, 28, 31, 31, 40])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    assert timing.medians(calls, rounds=3, device=CPU, warm_up=1) == {"a": 3, "b": 3}
    assert called == ["a", "b"] * 4


def test_nms_gives_ratios_and_keeps_torchvisions_boxes(tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["--boxes", "300", "--classes", "1", "5", "--rounds", "1", "--json", str(out)]
    assert nms.main(args) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"^   300 boxes,  5 classes, +\d+ kept: .* torchvision .*, x[\d.]+$", text, re.M
    )
    assert [row["classes"] for row in json.loads(out.read_text())["rows"]] == [1, 5]


def test_nms_notices_another_box(monkeypatch):
    right = nms.batched_nms
    monkeypatch.setattr(nms, "batched_nms", lambda b, s, g, t, n, pixel: right(b, s, g, t, n, True))
    with pytest.raises(AssertionError, match="other boxes"):
        nms.main(["--boxes", "3000", "--classes", "1", "--rounds", "1"])


def test_detect_gives_ratios_to_the_plain_way_and_the_network(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert detect.main(["--rounds", "1", "--amp", "off", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^crowded: 14\d,\d{3} scores over 0.02 a picture$", text, re.M)
    assert re.search(r"^trained: [2-9]\d\d scores over 0.02 a picture$", text, re.M)
    assert re.search(r"^  forward off .* Detect takes [\d.]+% of it$", text, re.M)
    rows = json.loads(out.read_text())["rows"]
    assert set(rows["trained"]["seconds"]) == {"Detect", "plain", "forward off"}


@pytest.mark.parametrize("key", ["labels", "boxes", "scores"])
def test_detect_notices_another_detection(key):
    found = {"boxes": torch.ones(2, 4), "scores": torch.ones(2), "labels": torch.ones(2)}
    detect.check([found], [found])
    with pytest.raises(AssertionError):
        detect.check([found], [found | {key: found[key] + 0.1}])


def test_coco_eval_gives_ratios_and_equal_digits(tmp_path, capsys):
    pytest.importorskip("hotcoco")
    out = tmp_path / "out.json"
    args = ["--images", "20", "--detections", "30", "--rounds", "1", "--commands"]
    assert coco_eval.main([*args, "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("20 pictures, 140 objects, 600 detections")
    assert re.search(r"^pycocotools itself .* x1\.0 ", text, re.M)
    assert re.search(r"^hotcoco 1\.\S+ .* s   x[\d.]+ +every digit equal$", text, re.M)
    assert re.search(r"^command, hotcoco .* x[\d.]+$", text, re.M)
    stats = json.loads(out.read_text())["stats"]["pycocotools itself"]
    assert 0.01 < stats[0] < 0.99 and -1 not in stats


def test_coco_eval_notices_a_wrong_digit(monkeypatch):
    pytest.importorskip("hotcoco")
    right = coco_eval.by_backend
    monkeypatch.setattr(coco_eval, "by_backend", lambda *a: [v + 1e-16 for v in right(*a)])
    with pytest.raises(AssertionError, match="hotcoco"):
        coco_eval.main(["--images", "5", "--detections", "5", "--rounds", "1"])


def test_voc_eval_gives_seconds_and_equal_curves(tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["--images", "30", "--detections", "20", "--rounds", "1", "--json", str(out)]
    assert voc_eval.main(args) == 0
    text = capsys.readouterr().out
    assert re.match(r"30 pictures, \d+ objects, 600 detections; VOC07 .* 0\.[1-9]\d+,", text)
    assert re.search(r"^read and score them .* s   x[\d.]+$", text, re.M)
    assert "every point of every curve equal" in text
    assert set(json.loads(out.read_text())["seconds"]) == {"write", "read", "score", "loop"}


def test_voc_eval_notices_a_wrong_curve(monkeypatch):
    right = voc_eval.loop
    monkeypatch.setattr(voc_eval, "loop", lambda *a: [v * (1 - 1e-15) for v in right(*a)])
    with pytest.raises(AssertionError, match="the recalls differ"):
        voc_eval.main(["--images", "5", "--detections", "5", "--rounds", "1"])
