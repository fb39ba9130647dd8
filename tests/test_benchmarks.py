"""The benchmarks, tiny: they run, compare what they time, and notice a wrong result."""

import importlib
import itertools
import json
import math
import os
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from nms_routines import needs_torchvision
from tiny import TINY

import models
from benchmarks import harness, loader, nms, on_gpu, scores, train
from benchmarks.harness import CPU
from demo import shapes
from utils.errors import UserError


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(models.BACKBONES, "tiny", TINY)


def test_calls_take_turns_and_the_warm_up_is_not_kept(monkeypatch):
    clock = iter([0, 9, 9, 18, 18, 20, 20, 21, 21, 25, 25, 28, 28, 31, 31, 40])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    called = []
    calls = {name: lambda name=name: called.append(name) or len(called) for name in "ab"}
    assert harness.race(calls, 3, CPU, warm_up=1) == ({"a": 3, "b": 3}, {"a": 7, "b": 8})
    assert called == ["a", "b"] * 4


@pytest.mark.parametrize("error", [{}, {"error": "out of memory"}])
def test_rows_are_printed_and_kept_as_they_come(tmp_path, capsys, error):
    out = tmp_path / "new" / "out.json"

    def rows(args, device):
        yield {"network": "SSD_vgg", "seconds": {"ours": 0.00125}, "n": [1, 2.5]} | error
        assert len(json.loads(out.read_text())["rows"]) == 1
        yield {"n": 3}

    status = harness.run(partial(harness.options, rows, 5, False), ["--json", str(out)])
    assert status == bool(error)
    first, row, last = capsys.readouterr().out.splitlines()
    assert row.startswith("SSD_vgg; ms ours 1.25; n 1 2.5") and last == "n 3"
    content = json.loads(out.read_text())
    assert content["machine"] == first == harness.machine(CPU) and content["rows"][1] == {"n": 3}


def series(rng, median, noise=0.02, rounds=10):
    return (median * np.exp(rng.normal(0, noise, rounds))).tolist()


def test_equal_times_give_evidence_no_more_often_than_the_confidence_says():
    rng = np.random.default_rng(0)
    found = [harness.ratio(series(rng, 1), series(rng, 1), 0.9) for _ in range(1000)]
    assert 0.05 < np.mean([not low <= 1 <= high for _, low, high in found]) < 0.11


def test_the_interval_is_that_of_the_tables_of_mann_and_whitney():
    """Of 5 against 5 times the third pair from either end, as the critical value of U is 2."""
    before, after = [1, 2, 3, 4, 5], [16, 32, 64, 128, 256]
    pairs = sorted(b / a for a, b in itertools.product(before, after))
    assert harness.ratio(before, after, 0.95) == pytest.approx((pairs[12], pairs[2], pairs[-3]))
    for wrong in ([], [0.0]):
        with pytest.raises(ValueError, match="times"):
            harness.ratio([1.0], wrong)


@pytest.mark.parametrize(("ratio", "rounds", "verdict"), [
    (0.5, 10, "holds"), (0.6, 10, "does not hold"), (0.55, 10, "no evidence"),
    (0.5, 2, "no evidence")])
def test_a_claim_holds_where_the_interval_is_below_its_limit(ratio, rounds, verdict):
    rng = np.random.default_rng(0)
    found = harness.claim(0.55, series(rng, 1, rounds=rounds), series(rng, ratio, rounds=rounds))
    assert found["verdict"] == verdict
    assert (found["interval"] is None) == (rounds == 2)


ON = "--device cpu --rounds 1 --amp off"
COCO = "coco --rounds 1 --images 20 --detections 30"
VOC = "voc --rounds 1 --images 30 --detections 20"
LOSS = f"loss {ON} --batch 2 --size 300 --classes 5"
MEMORY = f"memory {ON} --size 300 --version tiny"
SUPPRESS = "suppress --device cpu --rounds 1 --boxes 3000"
needs_hotcoco = pytest.mark.skipif(not find_spec("hotcoco"), reason="hotcoco is not installed")


def rows_of(capsys, module, argv):
    """The rows of a benchmark, by the last line of its output."""
    assert module.main([*argv.split(), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


@pytest.mark.parametrize(("module", "argv", "holds"), [
    pytest.param(nms, f"{SUPPRESS} --classes 1 5 --batch 2",
                 lambda one, five: 0 < one["kept"] < five["kept"] < 6000,
                 marks=needs_torchvision),
    pytest.param(nms, f"detect {ON}",
                 lambda crowded, trained: crowded["scores"] // 10_000 == 14
                 and 200 < trained["scores"] < 1000 and "forward off" in trained["seconds"],
                 marks=needs_torchvision),
    pytest.param(scores, f"{COCO} --commands",
                 lambda *rows: [row["result"] for row in rows if "hotcoco" in row["scorer"]]
                 == ["every digit equal", "the same table"], marks=needs_hotcoco),
    (scores, VOC, lambda row: row["detections"] == 600 and 0.1 < row["AP"]["area"] < 0.9),
    (train, LOSS, lambda row: row["ratio"] == row["seconds"]["ours"]
     / row["seconds"]["published"]),
    (train, MEMORY, lambda row: row["kept"]["plain"] > 1 and row["peak"]["plain"] > 100)])
def test_benchmark_runs_and_compares(capsys, monkeypatch, tiny, module, argv, holds):
    monkeypatch.setattr(nms, "build_net", lambda *a: torch.nn.Conv2d(3, 1, 1))
    monkeypatch.setattr(harness, "in_a_process", lambda call, *arguments: call(*arguments))
    assert holds(*rows_of(capsys, module, argv))


@pytest.mark.parametrize("batch", [1, 8])
def test_no_two_boxes_have_the_same_score(batch):
    """Routines order boxes of equal score by class or by position."""
    _, scores, groups = nms.make_boxes(10_000, 80, batch)
    assert len(scores.unique()) == 10_000 * batch and len(groups.unique()) == 80 * batch


def other_gradients(net, images, priors, amp, recompute):
    return (torch.tensor(recompute),)


@pytest.mark.parametrize(("ours", "theirs", "message"), [
    ([0.2, 0.1 + 1e-16], [0.2, 0.1], "hotcoco"), ([math.nan], [0.1], "hotcoco"),
    ("a table", "another", "hotcoco prints")])
def test_another_digit_of_a_backend_is_noticed(ours, theirs, message):
    scores.difference("hotcoco", theirs, theirs)
    with pytest.raises(AssertionError, match=message):
        scores.difference("hotcoco", ours, theirs)


@pytest.mark.parametrize(("module", "name", "wrong", "argv", "message"), [
    pytest.param(nms, "batched_nms", partial(nms.batched_nms, method="gaussian"),
                 f"{SUPPRESS} --classes 1", "other boxes", marks=needs_torchvision),
    (scores, "loop", lambda *a: ([1.0], [1.0]), VOC, "another recall"),
    (train, "VARIANCE", (0.1, 0.1), LOSS, "not close"),
    (train, "gradients", other_gradients, MEMORY, "tiny off: .* other gradients")])
def test_another_result_is_noticed(monkeypatch, tiny, module, name, wrong, argv, message):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError, match=message):
        module.main(argv.split())


@pytest.mark.parametrize("key", ["labels", "boxes", "scores"])
def test_another_detection_is_noticed(key):
    found = {"boxes": torch.ones(2, 4), "scores": torch.ones(2), "labels": torch.ones(2)}
    nms.check([found], [found])
    with pytest.raises(AssertionError):
        nms.check([found], [found | {key: found[key] + 0.1}])


def test_step_gives_the_same_losses_by_both_ways(voc_folder, capsys, tiny):
    line = f"step --root {voc_folder} --version tiny --batch 2 --lr 1e-4 --amp off --rounds 12"
    (row,) = rows_of(capsys, train, f"{line} --device cpu")
    assert len(row["losses"]["plain"]) == 2
    assert row["losses"]["ours"] == pytest.approx(row["losses"]["plain"], rel=1e-3)
    assert set(row["images a second"]) == {"plain", "ours", "rounding"}


def test_step_draws_images_where_none_are_given(monkeypatch):
    monkeypatch.setattr(train, "make_dataset", lambda root, *n: shapes.make_dataset(root, 4, 1))
    batches, num_classes = train.batches_of(None, 300, 2, 3)
    assert [len(images) for images, *_ in batches] == [2, 2, 2]
    assert num_classes == 1 + len(shapes.CLASSES)


def affinity():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def test_loader_gives_the_ratio_to_imread_of_the_same_files(voc_folder, capsys):
    cores, threads = affinity(), (torch.get_num_threads(), cv2.getNumThreads())
    line = f"--root {voc_folder} --size 300 512 --batch 2 --images 7 --rounds 1 --workers 1"
    rows = rows_of(capsys, loader, f"{line} --cache memory")
    ways = itertools.product([300, 512], ["one core", "one core, --cache memory", "1 processes"])
    assert [(row["size"], row["way"]) for row in rows] == list(ways)
    for row in rows:
        assert (row["images"], row["samples"]) == (6, 8)
        assert row["ratio"] == pytest.approx(row["samples a second"] / row["cv2.imread"])
    assert (cores, threads) == (affinity(), (torch.get_num_threads(), cv2.getNumThreads()))


def test_loader_reads_the_files_of_its_batches(voc_folder):
    dataset = loader.open_sets(voc_folder, None)
    sampler = loader.EpochSampler(len(dataset), 2, loader.SEED)
    expected = []
    for epoch, start in ((0, 0), (1, 2)):
        sampler.set_epoch(epoch, start)
        expected += [str(dataset.image_path(i)) for batch in sampler for _, i in batch]
    assert loader.files(dataset, sampler, steps=4) == expected


def test_loader_takes_all_trainval_sets_or_those_that_are_named(voc_devkit, tmp_path):
    assert len(loader.open_sets(voc_devkit, None)) == 5
    assert len(loader.open_sets(voc_devkit, "2007_trainval,2007_test")) == 6
    with pytest.raises(UserError, match=f"{tmp_path}/none.*--sets"):
        loader.open_sets(tmp_path / "none", None)


def test_loader_notices_other_samples(voc_folder, monkeypatch):
    def other(where, dataset):
        return lambda i: dataset.pull_image(5 - i)

    monkeypatch.setattr(loader, "open_cache", other)
    with pytest.raises(AssertionError, match="other samples"):
        loader.main(["--root", str(voc_folder), "--cache", "memory", "--rounds", "1"])


@pytest.mark.parametrize("quick", [False, True])
def test_every_line_of_the_gpu_script_is_understood(quick, tmp_path):
    """By the parser of the program that it calls."""
    from engine import options

    settings = on_gpu.Settings(quick=quick, bccd="/data/B C", options="--lr 1e-3")
    seen = set()
    for part in on_gpu.PARTS.values():
        for stage in part.stages(settings, tmp_path):
            for _, line in stage.values():
                argv = on_gpu.command_of(line, settings, Path("out.json"))[1:]
                if argv[:2] == ["-m", "torch.distributed.run"]:
                    argv = argv[5:]
                if argv[0] == "-m" and argv[1].startswith("benchmarks."):
                    importlib.import_module(argv[1]).parser().parse_args(argv[2:])
                elif argv[0] == "train_test.py":
                    options.parse(argv[1:])
                else:
                    assert argv[:2] == ["-m", "pytest"] or argv[0] in ("-c", "utils/build.py")
                seen.add(argv[1] if argv[0] == "-m" else argv[0])
    assert seen >= {"benchmarks.nms", "benchmarks.speed", "benchmarks.train", "train_test.py"}


def test_parts_that_are_not_asked_for_get_no_time():
    assert on_gpu.reserve([["step"], ["tests", "bccd"]]) == 40 + 150
    assert on_gpu.reserve([[]]) == on_gpu.reserve([]) == 0


def test_every_call_has_its_time():
    """Limits of stages within those of their part, parts within the limit of everything."""
    settings = on_gpu.Settings(bccd="/data")
    for name, part in on_gpu.PARTS.items():
        stages = part.stages(settings, Path("runs"))
        assert sum(max(limit for limit, _ in x.values()) for x in stages) <= part.limit, name
    alone = [part.limit for name, part in on_gpu.PARTS.items() if name not in on_gpu.TOGETHER]
    together = max(on_gpu.PARTS[name].limit for name in on_gpu.TOGETHER)
    assert sum(alone) + together <= settings.limit


def test_settings_are_those_of_the_environment():
    env = {"DEVICE": "cpu", "QUICK": "1", "SEEDS": "3 4", "LIMIT": "30", "OUT": "x", "HOME": "/"}
    expected = on_gpu.Settings("cpu", True, seeds="3 4", limit=30, out=Path("x"))
    assert on_gpu.Settings.of(env) == expected and not expected.gpu


def test_a_call_that_fails_or_hangs_stops_nothing_else(tmp_path, monkeypatch, capfd):
    def stages(settings, folder):
        return [{"fails": (9, "-c 'print(1); raise SystemExit(3)'")},
                {"hangs": (1.5, "-c 'import time; print(7, flush=True); time.sleep(60)'"),
                 "beside": (9, "-c 'print(6)'")}, {"works": (9, "-c 'print(5 * 5)'")}]

    parts = {"one": on_gpu.Part(stages, 30, 5), "two": on_gpu.Part(stages, 9, 5, "bccd")}
    monkeypatch.setattr(on_gpu, "PARTS", parts)
    start = time.monotonic()
    assert on_gpu.main([], on_gpu.Settings(out=tmp_path / "out")) == 1
    assert time.monotonic() - start < 20
    one, two = map(json.loads, (tmp_path / "out/results.jsonl").read_text().splitlines())
    assert (one["status"], one["failed"], two["status"]) == ("failed", ["fails", "hangs"],
                                                             "needs bccd")
    found = {name: (each["status"], each["lines"]) for name, each in one["results"].items()}
    assert found == {"fails": (3, ["1"]), "hangs": (None, ["7"]), "beside": (0, []),
                     "works": (0, ["25"])}
    table = capfd.readouterr().out
    assert "status 3" in table and "stopped" in table and "    25" in table
    assert on_gpu.main(["three"], on_gpu.Settings(out=tmp_path)) == 2
