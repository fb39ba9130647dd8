"""The benchmarks, tiny: they run, compare what they time, and notice a wrong result."""

import importlib
import itertools
import json
import math
import re
import shlex
import signal
import threading
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from nms_routines import needs_torchvision

from benchmarks import gather, harness, loader, nms, on_gpu, scores, train
from benchmarks.harness import CPU
from data import voc_eval
from engine import options
from inference.gathered_conv import GatheredWeight
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
PAGES = ("benchmarks/README.md", "benchmarks/gpu/README.md", "docs/performance.md")


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_pages_are_understood(page):
    text = (ROOT / page).read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"python -m benchmarks\.(\w+)(?: ([^`\n]*))?", text)
    assert commands
    for name, rest in commands:
        importlib.import_module(f"benchmarks.{name}").parser().parse_args(shlex.split(rest))


def test_calls_take_turns_and_the_warm_up_is_not_kept(monkeypatch):
    clock = iter([0, 9, 9, 18, 18, 20, 20, 21, 21, 25, 25, 28, 28, 31, 31, 40])
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    called = []
    calls = {name: lambda name=name: called.append(name) or len(called) for name in "ab"}
    assert harness.race(calls, 3, CPU, warm_up=1) == ({"a": 3, "b": 3}, {"a": 7, "b": 8})
    assert called == ["a", "b"] * 4


@pytest.mark.parametrize("error", [{}, {"error": "out of memory"}])
def test_rows_are_printed_and_kept(tmp_path, capsys, error):
    def rows(args, device):
        yield {"network": "SSD_vgg", "seconds": {"ours": 0.00123456}, "n": [1, 2.5]} | error
        yield {"n": 3}

    out = tmp_path / "new" / "out.json"
    status = harness.run(partial(harness.options, rows, 5), ["--json", str(out), "--device", "cpu"])
    assert status == bool(error)
    machine, *printed = capsys.readouterr().out.splitlines()
    content = json.loads(out.read_text())
    assert content["machine"] == machine and content["rows"][0]["seconds"]["ours"] == 0.00123456
    content["rows"][0]["seconds"]["ours"] = 0.001235
    assert content["rows"] == [json.loads(line) for line in printed]


def test_the_interval_is_that_of_the_tables_of_mann_and_whitney():
    """Of 5 against 5 times the third pair from either end, as the critical value of U is 2."""
    before, after = [1, 2, 3, 4, 5], [16, 32, 64, 128, 256]
    pairs = sorted(b / a for a, b in itertools.product(before, after))
    assert harness.ratio(before, after, 0.95) == pytest.approx((pairs[12], pairs[2], pairs[-3]))
    assert harness.ratio([1, 2], [2, 1])[1:] == (0, math.inf)


ON = "--device cpu --rounds 1 --amp off"
COCO = "coco --rounds 1 --images 20 --detections 30"
VOC = "voc --rounds 1 --images 30 --detections 20"
LOSS = f"loss {ON} --batch 2 --size 300"
MEMORY = f"memory {ON} --size 300 --version tiny"
STEP = f"step {ON} --size 300 --version tiny --batch 2"
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
                 lambda *rows: [row["result"] for row in rows if "hotcoco" in row["scorer"]][1:]
                 == ["the same table"], marks=needs_hotcoco),
    (scores, VOC, lambda row: row["detections"] == 600 and 0.1 < row["AP"]["area"] < 0.9),
    (train, LOSS, lambda row: min(row["seconds"].values()) > 0 and row["ratio"] < 1),
    (train, STEP, lambda row: row["last losses"]["ours"]
     == pytest.approx(row["last losses"]["plain"], rel=1e-3)),
    (train, MEMORY, lambda row: 1 < row["kept"]["recomputed"] <= row["kept"]["plain"])])
def test_benchmark_runs_and_compares(capsys, monkeypatch, tiny, module, argv, holds):
    if "detect" in argv:
        priors = harness.new_net("tiny", 512, CPU)[1]
        monkeypatch.setattr(harness, "new_net", lambda *a: (torch.nn.Conv2d(3, 1, 1), priors))
    assert holds(*rows_of(capsys, module, argv))


@pytest.mark.parametrize("batch", [1, 8])
def test_no_two_boxes_have_the_same_score(batch):
    """Routines order boxes of equal score by class or by position."""
    _, scores, groups = nms.make_boxes(10_000, 80, batch)
    assert len(scores.unique()) == 10_000 * batch and len(groups.unique()) == 80 * batch


def other_gradients(net, images, priors, amp, recompute):
    return (torch.tensor(recompute),)


@pytest.mark.parametrize(("ours", "theirs", "message"), [
    ([0.2, 0.1 + 1e-13], [0.2, 0.1], "hotcoco"), ([math.nan], [0.1], "hotcoco"),
    ("a table", "another", "hotcoco prints")])
def test_another_digit_of_a_backend_is_noticed(ours, theirs, message):
    scores.difference("hotcoco", theirs, theirs)
    with pytest.raises(AssertionError, match=message):
        scores.difference("hotcoco", ours, theirs)


@pytest.mark.parametrize(("module", "name", "wrong", "argv", "message"), [
    pytest.param(nms, "batched_nms", partial(nms.batched_nms, method="gaussian"),
                 f"{SUPPRESS} --classes 1", "other boxes", marks=needs_torchvision),
    (train, "VARIANCE", (0.1, 0.1), LOSS, "not close"),
    (train, "gradients", other_gradients, MEMORY, "tiny off: .* other gradients")])
def test_another_result_is_noticed(monkeypatch, tiny, module, name, wrong, argv, message):
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError, match=message):
        module.main(argv.split())


def test_loader_gives_the_ratio_to_imread_of_the_same_files(voc_folder, capsys, monkeypatch):
    read, cv2_imread = [], loader.cv2.imread
    monkeypatch.setattr(loader, "imread", lambda paths: read.append([*map(cv2_imread, paths)]))
    line = f"--root {voc_folder} --size 300 512 --batch 2 --images 7 --rounds 1 --workers 1"
    rows = rows_of(capsys, loader, f"{line} --cache memory --device cpu")
    ways = itertools.product([300, 512],
                             ["one thread", "one thread, --cache memory", "1 processes"])
    assert [(row["size"], row["way"]) for row in rows] == list(ways)
    for row in rows:
        assert (row["images"], row["samples"]) == (6, 12)
        assert row["ratio"] == pytest.approx(row["samples a second"] / row["cv2.imread"])
    assert [len(images) for images in read] == [12, 12]


def test_loader_takes_all_trainval_sets(voc_devkit, tmp_path):
    assert len(loader.open_sets(voc_devkit)) == 5
    with pytest.raises(UserError, match=f"{tmp_path}/none.*--root"):
        loader.open_sets(tmp_path / "none")


def test_loader_notices_other_samples(voc_folder, monkeypatch):
    def other(where, dataset):
        return lambda i: dataset.pull_image(5 - i)

    monkeypatch.setattr(loader, "open_cache", other)
    with pytest.raises(AssertionError, match="other samples"):
        loader.main(["--root", str(voc_folder), "--cache", "memory", "--rounds", "1"])


# ---------------------------------------------------------------- everything that needs a GPU


@pytest.mark.parametrize("quick", ["", "1"])
def test_every_line_of_the_gpu_script_is_understood(quick, tmp_path):
    """By the parser of the program that it calls."""
    settings = on_gpu.Settings(quick=quick, bccd="/data/B C", options="--lr 1e-3")
    seen = set()
    for part in on_gpu.PARTS.values():
        for stage in part(settings, tmp_path):
            for _, line in stage.values():
                argv = on_gpu.command_of(line, settings)[1:]
                if argv[0] == "-m" and argv[1].startswith("benchmarks."):
                    args = importlib.import_module(argv[1]).parser().parse_args(argv[2:])
                    assert args.device == "cuda" and (not quick or args.rounds == 1)
                elif argv[:2] == ["-m", "data.voc_eval"]:
                    voc_eval.build_parser().parse_args(argv[2:])
                elif argv[0] == "train_test.py":
                    _, given = options.parse(argv[1:])
                    assert given.get("batch_size", 4) == (4 if quick else 16) or "--test" in argv
                else:
                    assert argv[:2] == ["-m", "pytest"] or argv[0] in ("-c", "utils/build.py")
                seen.add(argv[1] if argv[0] == "-m" else argv[0])
    assert seen >= {"benchmarks.nms", "benchmarks.speed", "benchmarks.train", "benchmarks.loader",
                    "benchmarks.gather", "train_test.py", "pytest"}


def test_every_call_has_its_time():
    """The limits of all stages are within the limit of everything."""
    settings = on_gpu.Settings(bccd="/data")
    limits = {name: sum(max(limit for limit, _ in stage.values())
                        for stage in part(settings, Path("runs")))
              for name, part in on_gpu.PARTS.items()}
    together = max(limits.pop(name) for name in on_gpu.TOGETHER)
    assert sum(limits.values()) + together <= float(settings.limit)


def test_settings_are_those_of_the_environment():
    env = {"DEVICE": "cpu", "QUICK": "1", "SEEDS": "3 4", "LIMIT": "30", "OUT": "x", "HOME": "/"}
    expected = on_gpu.Settings("cpu", "1", seeds="3 4", limit="30", out="x")
    assert on_gpu.Settings.of(env) == expected and not expected.gpu


def test_a_call_that_fails_or_hangs_stops_nothing_else(tmp_path, monkeypatch, capfd):
    def stages(settings, folder):
        return [{"fails": (9, "-c 'print(1); raise SystemExit(3)'")},
                {"hangs": (1.5, "-c 'import time; print(7, flush=True); time.sleep(60)'"),
                 "beside": (9, "-c 'print(6)'")}, {"works": (9, "-c 'print(5 * 5)'")}]

    monkeypatch.setattr(on_gpu, "PARTS", {"one": stages, "bccd": stages})
    start, out = time.monotonic(), tmp_path / "out"
    assert on_gpu.main([], on_gpu.Settings(out=str(out))) == 1
    assert time.monotonic() - start < 20
    def without_times(text):
        return re.sub(r" [\d.]+ s\b", "", text).replace(" \n", "\n")

    report = without_times(capfd.readouterr().out)
    assert report == """\
one: failed,
  one_fails status 3
    1
  one_hangs stopped
    7
  one_beside
    6
  one_works
    25
bccd: needs bccd,
"""
    log = without_times((out / "log.txt").read_text())
    assert all(f"=====  {line}\n" in log for line in re.findall(r"one_.*", report))
    assert on_gpu.main(["three"], on_gpu.Settings(out=str(out))) == 2
    assert on_gpu.main(["one"], on_gpu.Settings(out=str(out), limit="0")) == 1
    assert "one_hangs stopped" in without_times(capfd.readouterr().out)


def test_a_signal_ends_every_call(tmp_path, monkeypatch, capfd):
    line = "-c 'import time; print(7, flush=True); time.sleep(60)'"
    monkeypatch.setattr(on_gpu, "PARTS", {"one": lambda *_: [{"a": (50, line), "b": (50, line)}]})
    monkeypatch.setattr(on_gpu, "SIGNALS", [])
    threading.Timer(1, on_gpu.SIGNALS.append, [signal.SIGTERM]).start()
    start = time.monotonic()
    assert on_gpu.main([], on_gpu.Settings(out=str(tmp_path / "out"))) == 1
    assert time.monotonic() - start < 20
    assert capfd.readouterr().out.count("stopped") == 2


def test_a_share_of_the_gathered_convolutions_runs_and_the_others_give_zeros(monkeypatch):
    def run(parts, weight, out=None):
        return torch.ones(len(parts[0]), len(weight.bias), *parts[0].shape[2:])

    monkeypatch.setattr(gather.gathered_conv, "gathered_conv2d", run)
    weights = [GatheredWeight(torch.rand(n, 5, 1, 1), torch.rand(n), [2, 3], "relu")
               for n in (4, 6, 8)]
    parts = [torch.rand(1, n, 7, 7) for n in (2, 3)]
    for number in range(2):
        share = gather.Share(number, 2)
        found = [share(parts, weight) for weight in [*weights, weights[0]]]
        assert [x.shape[1] for x in found] == [4, 6, 8, 4] and len(share.seen) == 3
        assert [bool(x.all()) for x in found] == [k % 2 == number for k in (0, 1, 2, 0)]
