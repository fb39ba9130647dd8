"""The benchmarks, tiny: they run, compare what they say, and notice a wrong result."""

import json
import os
import re
import subprocess

import cv2
import pytest
import torch
from nms_routines import needs_torchvision
from tiny import TINY

import models
from benchmarks import (
    coco_eval,
    coco_load,
    detect,
    loader,
    loss,
    memory,
    network,
    nms,
    step,
    timing,
    voc_eval,
)
from benchmarks.timing import CPU
from data.coco import COCODetection
from demo import shapes


def test_medians_take_turns_and_leave_the_warm_up_out(monkeypatch):
    clock = iter([0, 9, 9, 18, 18, 20, 20, 21, 21, 25, 25, 28, 28, 31, 31, 40])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    assert timing.medians(calls, rounds=3, device=CPU, warm_up=1) == {"a": 3, "b": 3}
    assert called == ["a", "b"] * 4


def test_file_says_the_machine_and_is_left_out_without_a_path(tmp_path):
    timing.write(tmp_path / "new" / "out.json", CPU, rows=[1])
    content = json.loads((tmp_path / "new" / "out.json").read_text())
    assert content == {"machine": timing.machine(CPU), "rows": [1]}
    assert "CPU threads, PyTorch " in content["machine"]
    timing.write(None, CPU, rows=[1])


def test_network_gives_ratios_to_vgg(tmp_path, capsys, monkeypatch):
    def measure(device, size, batch, amp, rounds):
        return {version: 2 for version in network.BACKBONES}

    monkeypatch.setattr(network, "measure", measure)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    out = tmp_path / "out.json"
    args = ["--device", "cpu", "--size", "300", "--batch", "4", "--amp", "off", "--json", str(out)]
    assert network.main(args) == 0
    first, _, row = capsys.readouterr().out.splitlines()
    content = json.loads(out.read_text())
    assert first == content["machine"] == timing.machine(CPU)
    assert re.match(r" 300 +4 off +2\.0 img/s  x1\.00 ", row)
    assert [row["batch"] for row in content["rows"]] == [4]


@needs_torchvision
def test_nms_gives_ratios_and_keeps_torchvisions_boxes(tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["--boxes", "300", "--classes", "1", "5", "--rounds", "1", "--json", str(out)]
    assert nms.main(args) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"^   300 boxes,  5 classes, +\d+ kept: .* torchvision .*, x[\d.]+$", text, re.M
    )
    assert [row["classes"] for row in json.loads(out.read_text())["rows"]] == [1, 5]


@needs_torchvision
def test_nms_notices_another_box(monkeypatch):
    right = nms.batched_nms
    monkeypatch.setattr(nms, "batched_nms", lambda b, s, g, t, n, pixel: right(b, s, g, t, n, True))
    with pytest.raises(AssertionError, match="other boxes"):
        nms.main(["--boxes", "3000", "--classes", "1", "--rounds", "1"])


@needs_torchvision
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
    assert re.search(r"^20 pictures, 140 objects, 600 detections", text, re.M)
    assert re.search(r"^pycocotools itself .* x1\.0 ", text, re.M)
    assert re.search(r"^hotcoco 1\.\S+ .* s   x[\d.]+ +every digit equal$", text, re.M)
    assert re.search(r"^command, pycocotools .* x1\.0$", text, re.M)
    assert re.search(r"^command, hotcoco .* x[\d.]+$", text, re.M)
    content = json.loads(out.read_text())
    stats = content["stats"]["pycocotools itself"]
    assert 0.01 < stats[0] < 0.99 and -1 not in stats
    assert {"pycocotools itself", "command, pycocotools", "command, hotcoco"} <= set(
        content["seconds"]
    )


@pytest.mark.parametrize("wrong", [lambda v: v + 1e-16, lambda v: float("nan")])
def test_coco_eval_notices_a_wrong_digit(monkeypatch, wrong):
    pytest.importorskip("hotcoco")
    right = coco_eval.by_backend
    monkeypatch.setattr(coco_eval, "by_backend", lambda *a: [wrong(v) for v in right(*a)])
    with pytest.raises(AssertionError, match="hotcoco"):
        coco_eval.main(["--images", "5", "--detections", "5", "--rounds", "1"])


def test_coco_eval_notices_another_table(monkeypatch):
    pytest.importorskip("hotcoco")

    def run(line, **options):
        return subprocess.CompletedProcess(line, 0, stdout=f"by {line[-1]}")

    monkeypatch.setattr(coco_eval.subprocess, "run", run)
    with pytest.raises(AssertionError, match="command, hotcoco prints\nby hotcoco"):
        coco_eval.main(["--images", "5", "--detections", "5", "--rounds", "1", "--commands"])


def test_voc_eval_gives_seconds_and_equal_curves(tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["--images", "30", "--detections", "20", "--rounds", "1", "--json", str(out)]
    assert voc_eval.main(args) == 0
    text = capsys.readouterr().out
    assert re.search(
        r"^30 pictures, \d+ objects, 600 detections; VOC07 .* 0\.[1-9]\d+,", text, re.M
    )
    assert re.search(r"^read and score them .* s   x[\d.]+$", text, re.M)
    assert "every point of every curve equal" in text
    assert set(json.loads(out.read_text())["seconds"]) == {"write", "read", "score", "loop"}


def test_voc_eval_notices_a_wrong_curve(monkeypatch):
    right = voc_eval.loop
    monkeypatch.setattr(voc_eval, "loop", lambda *a: [v * (1 - 1e-15) for v in right(*a)])
    with pytest.raises(AssertionError, match="the recalls differ"):
        voc_eval.main(["--images", "5", "--detections", "5", "--rounds", "1"])


def test_loader_gives_the_ratio_to_imread_of_the_same_files(voc_folder, capsys):
    cores, threads = affinity(), (torch.get_num_threads(), cv2.getNumThreads())
    args = ["--root", str(voc_folder), "--size", "300", "512", "--batch", "2", "--pictures", "7"]
    args += ["--rounds", "1", "--workers", "1", "--cache", "memory", "--json", "-"]
    assert loader.main(args) == 0
    text = capsys.readouterr().out
    assert re.search(r"^6 pictures \(trainval\), 8 a round; \d+ a second decoded$", text, re.M)
    assert re.search(r"^ 512 1 processes  .* samples/s   x[\d.]+ of cv2.imread$", text, re.M)
    content = json.loads(text.splitlines()[-1])
    assert content["size"] == 300
    assert content["pictures"] == 6
    assert content["machine"] == timing.machine(CPU)
    rates = content["samples_per_second_one_core"], content["cv2_imread_per_second"]
    assert content["ratio"] == pytest.approx(rates[0] / rates[1])
    assert [(row["size"], row["what"]) for row in content["rows"]] == [
        (size, what)
        for size in (300, 512)
        for what in ("one core", "one core, --cache memory", "1 processes")
    ]
    assert (cores, threads) == (affinity(), (torch.get_num_threads(), cv2.getNumThreads()))


def affinity():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def test_loader_reads_the_files_of_its_batches(voc_folder):
    dataset = loader.open_sets(voc_folder, None)
    sampler = loader.EpochSampler(len(dataset), 2, loader.SEED)
    expected = []
    for epoch, start in ((0, 0), (1, 2)):
        sampler.set_epoch(epoch, start)
        expected += [str(dataset.image_path(i)) for batch in sampler for _, i in batch]
    assert loader.files(dataset, sampler, steps=4) == expected


def test_loader_takes_all_trainval_sets_of_a_devkit_and_those_that_are_named(voc_devkit):
    assert len(loader.open_sets(voc_devkit, None)) == 5
    assert len(loader.open_sets(voc_devkit, "2007_trainval,2007_test")) == 6


def test_loader_refuses_a_folder_without_sets(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        loader.main(["--root", str(tmp_path)])
    assert error.value.code == 2
    assert f"{tmp_path}: no image set trainval; name others with --sets" in capsys.readouterr().err


def test_loader_notices_other_samples(voc_folder, monkeypatch):
    monkeypatch.setattr(
        loader, "open_cache", lambda where, dataset: lambda i: dataset.pull_image(5 - i)
    )
    with pytest.raises(AssertionError, match="other samples"):
        loader.main(["--root", str(voc_folder), "--cache", "memory", "--rounds", "1"])


def test_loss_gives_the_ratio_to_the_published_routine(capsys):
    args = ["--device", "cpu", "--batch", "2", "--size", "300", "--classes", "5", "--rounds", "1"]
    assert loss.main([*args, "--json", "-"]) == 0
    *_, text, last = capsys.readouterr().out.splitlines()
    assert re.search(
        r"^bf16 ours +[\d.]+ ms, published +[\d.]+ ms, ratio [\d.]+ \(x[\d.]+\)$", text
    )
    content = json.loads(last)
    assert [row["amp"] for row in content["rows"]] == ["off", "bf16"]
    for row in content["rows"]:
        assert row["ratio"] == row["seconds"]["ours"] / row["seconds"]["published"]


def test_loss_notices_another_value(monkeypatch):
    right = loss.published
    monkeypatch.setattr(loss, "published", lambda *a: [1.001 * value for value in right(*a)])
    with pytest.raises(AssertionError, match="not close"):
        loss.main(["--batch", "1", "--size", "300", "--classes", "5", "--device", "cpu"])


def test_memory_gives_what_recomputation_saves(tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["--device", "cpu", "--size", "300", "--versions", "SSD_HarDNet68", "--amp", "off"]
    assert memory.main([*args, "--rounds", "1", "--json", str(out)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.match(
        r"SSD_HarDNet68   off   kept +[\d.]+ -> +[\d.]+ \(x0\.6\d\),  "
        r"peak +[\d.]+ -> .*,  step .* s x[\d.]+$",
        line,
    )
    (row,) = json.loads(out.read_text())["rows"]
    assert row["kept"]["plain"] > 100 * 2**20
    assert set(row["seconds"]) == {"plain", "recomputed"}


def test_memory_notices_another_gradient(monkeypatch):
    def step_call(net, images, priors, amp, recompute):
        return lambda: (torch.tensor(recompute),)

    monkeypatch.setattr(memory, "step_call", step_call)
    with pytest.raises(AssertionError, match="SSD_HarDNet68 off: .* other gradients"):
        memory.main(["--device", "cpu", "--size", "300", "--amp", "off"])


def test_step_gives_the_ratio_and_both_loss_curves(voc_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)
    out = tmp_path / "out.json"
    args = ["--root", str(voc_folder), "--version", "tiny", "--batch", "2", "--steps", "12"]
    assert step.main([*args, "--lr", "1e-4", "--amp", "off", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^loss of steps +1- 10:  plain +[\d.]+  ours +[\d.]+  rounding ", text, re.M)
    content = json.loads(out.read_text())
    assert content["ratio"] == content["seconds"]["plain"] / content["seconds"]["ours"]
    plain, ours = (content["losses"][lane] for lane in ("plain", "ours"))
    assert len(plain) == 12
    assert ours == pytest.approx(plain, rel=1e-3)  # float32 both: the same losses by two routines


def test_step_draws_pictures_where_none_are_given(monkeypatch):
    monkeypatch.setattr(step, "make_dataset", lambda root, *counts: shapes.make_dataset(root, 4, 1))
    batches, num_classes = step.batches_of(None, 300, 2, 3)
    assert [len(images) for images, *_ in batches] == [2, 2, 2]
    assert num_classes == 1 + len(shapes.CLASSES)


def test_benchmark_of_loading_says_seconds_and_memory(tmp_path, capsys):
    out = tmp_path / "out.json"
    args = ["--images", "300", "--boxes", "2000", "--rounds", "1", "--json", str(out)]
    assert coco_load.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("300 pictures, 2000 boxes, a file of 1 MB")
    assert [line.split()[0] for line in lines[2:]] == ["json.load", "pycocotools", "reader"]
    found = json.loads(out.read_text())["medians"]
    assert found["reader"]["worker"] < found["pycocotools"]["worker"]
    assert found["reader"]["sent"] < 0.2
    coco_load.make_root(tmp_path, 300, 2000)
    dataset = COCODetection(tmp_path, [("2017", "train")])
    assert len(dataset) == 300 and sum(len(dataset.target(i)) for i in range(300)) == 2000
