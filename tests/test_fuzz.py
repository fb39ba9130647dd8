"""Mutated files of every kind that the project reads: each is read whole, or refused.

A function of `TARGETS` writes a good file, and returns it and what reads it. UserError refuses. Any
other exception, over `SECONDS` or `MEGABYTES`, and a reader's assertion that something is lost
without a word are failures. Hypothesis reduces the edits of a failing file, and prints the file.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import onnx
import pytest
import torch
from coco_files import annotation, write_val2017
from conftest import write_voc
from hypothesis import HealthCheck, Phase, given, settings
from mutate import JSON, JSON_LINES, NPZ, PTH, WORDS, XML, YAML, edits, mutate, replacements
from safetensors.torch import save
from test_runtime import DESCRIPTION, write_onnx

from data import build_dataset, find_layout, list_sets
from data.coco_eval import evaluate_coco
from data.config import VOC_CLASSES
from data.detections import save_detections
from data.image import IMAGE_SUFFIXES, read_image
from data.voc0712 import VOCDetection
from data.voc_comp4 import read_comp4, write_comp4
from engine.options import Call, Options, parse
from engine.resolve import resolve
from engine.run import find_checkpoint
from engine.testing import test_folder
from inference.images import TrainedOn
from inference.runtime import graph_inputs, open_model
from models.info import DetectorInfo
from models.transfer import match_classes, parse_class_map
from tools import check, detect, export
from tools.mistakes import list_mistakes
from tools.results import open_test, read_log, score_again
from tools.tables import error_tables, score_tables, training_tables
from utils.checkpoint import load_checkpoint, load_weights, save_checkpoint
from utils.errors import UserError

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # of NumPy, about wrong values
resource = pytest.importorskip("resource")  # not on Windows
SECONDS, MEGABYTES = 5, 1000
TARGETS = {}  # name: (function, codec of the file, inputs of the long run)


def target(codec=None, inputs=1000):
    def add(write):
        TARGETS[write.__name__] = write, codec, inputs
        return write

    return add


# ---------------------------------------------------------------- data sets

BOXES = {"a": [("dog", (5, 5, 40, 40)), ("cat", (50, 10, 90, 30))], "b": [("cat", (1, 2, 30, 60))]}


def read_data(kind, root):
    """Open a data set as tools.check does, then as training does."""
    find_layout(root)
    sets = list_sets(kind, root) or [(None, "train")]
    with contextlib.suppress(UserError):
        build_dataset(kind, root, sets, faults=[]).report()
    dataset = build_dataset(kind, root, sets)
    dataset.truth(), dataset.fingerprint(), dataset.report(), dataset.check_scorable()
    ",".join(dataset.classes).encode()
    return dataset


def lines_of(path):
    """Return how many lines are not empty, in a file of UTF-8."""
    return sum(bool(line.strip()) for line in path.read_text("utf-8-sig").splitlines())


def boxes_of(path, tag="bndbox"):
    elements = ElementTree.parse(path).iter()
    return sum(e.tag == tag for element in elements if element.tag != "part" for e in element)


def data_target(kind, write, file, codec, inputs, count, of="rows"):
    """Add a data set; what ``count`` counts in the file must be read, or be told of as skipped."""
    def make(folder):
        write(folder)

        def read():
            dataset, least = read_data(kind, folder), 0
            with contextlib.suppress(ValueError, SyntaxError):  # another encoding, say
                least = count(folder / file)
            assert least <= len(getattr(dataset, of)) + len(dataset.skipped), "lost without a word"

        return folder / file, read

    TARGETS[f"{kind} {file}"] = make, codec, inputs


def write_classes(folder):
    (write_voc(folder, {"test": BOXES}) / "classes.txt").write_text("dog\ncat\nfish\n")


def write_coco(folder):
    records = [annotation(k, k % 2 + 1, [k, k, 10, 12]) for k in range(4)]
    write_val2017(folder, records, ids=(1, 2))


def write_yolo(folder):
    write_voc(folder, {"test": BOXES})
    (folder / "JPEGImages").rename(folder / "images")
    shutil.rmtree(folder / "Annotations")
    shutil.rmtree(folder / "ImageSets")
    (folder / "labels").mkdir()
    text = "0 0.5 0.5 0.25 0.25\n1 0.25 0.25 0.75 0.25 0.5 0.75\n"
    for name in BOXES:
        (folder / f"labels/{name}.txt").write_text(text)
    (folder / "data.yaml").write_text("path: .\ntrain: [images]\nval: images\nnames: [dog, cat]\n")


def write_cvat(folder):
    write_yolo(folder)
    shutil.rmtree(folder / "labels")
    (folder / "data.yaml").unlink()
    box = '<box label="dog" xtl="5" ytl="5.5" xbr="40" ybr="40"></box>'
    images = "".join(f'<image id="{n}" name="{name}.jpg" width="96" height="72" subset="train">'
                     f"{box}</image>" for n, name in enumerate(BOXES))  # fmt: skip
    (folder / "annotations.xml").write_text(f"<annotations>{images}</annotations>")


data_target("YOLO", write_yolo, "labels/a.txt", WORDS, 1000, lambda path: lines_of(path) + 2)
data_target("YOLO", write_yolo, "data.yaml", YAML, 1000, lambda path: 4)
data_target("CVAT", write_cvat, "annotations.xml", XML, 1000, partial(boxes_of, tag="box"))
data_target("VOC", write_classes, "classes.txt", WORDS, 700, lines_of, "classes")
data_target("VOC", write_classes, "ImageSets/Main/test.txt", WORDS, 1000, lines_of, "ids")
data_target("VOC", partial(write_voc, sets={"test": BOXES}), "Annotations/a.xml", XML, 2000,
            lambda path: boxes_of(path) + 1)
data_target("COCO", write_coco, "annotations/instances_val2017.json", JSON, 2000,
            lambda path: len(json.loads(path.read_bytes())["annotations"]))


@target(JSON, 300)
def coco_results(folder):
    truth = write_val2017(folder, [annotation(1, 42, [1, 1, 9, 9])])
    truth /= "annotations/instances_val2017.json"
    path, record = folder / "found.json", {"image_id": 42, "category_id": 3, "score": 0.5}
    path.write_text(json.dumps([record | {"bbox": [k, 1, 9, 8.5]} for k in range(3)]))
    return path, partial(evaluate_coco, path, truth)


@target(WORDS)
def comp4(folder):
    found = [{"boxes": np.ones((2, 4)), "scores": np.full(2, 0.25), "labels": np.ones(2, int)}] * 2
    write_comp4(folder, "test", ["dog"], ["a", "b c"], found)
    path = folder / "comp4_det_test_dog.txt"

    def read():
        found, _ = read_comp4(folder, "test", ["dog"], ["a", "b c"])
        with contextlib.suppress(UnicodeDecodeError):
            assert len(found.scores) == lines_of(path), "lost detections"

    return path, read


def image(folder, suffix):
    path = folder / f"a{suffix}"
    pixels = np.random.default_rng(0).integers(0, 255, (9, 13, 3), np.uint8)
    path.write_bytes(cv2.imencode(suffix, pixels)[1].tobytes())

    def read():
        read = read_image(path)
        assert read.dtype == np.uint8 and read.ndim == 3 and read.shape[2] == 3

    return path, read


for suffix in IMAGE_SUFFIXES:
    if cv2.haveImageWriter(suffix) and suffix not in (".jpeg", ".tiff"):
        TARGETS[f"image{suffix}"] = partial(image, suffix=suffix), None, 1000


# ---------------------------------------------------------------- detectors

HEAD = torch.nn.Sequential(torch.nn.Conv2d(2, 18, 1))  # of 6 prior boxes and 3 classes
NET = torch.nn.ModuleDict({"conf": HEAD, "norm": torch.nn.BatchNorm2d(2)})
NAMES = ["dog", "cat"]
GIVEN = {"version": "SSD_HarDNet68", "size": 300, "root": "d", "classes": NAMES,
         "train_sets": [[None, "train"]], "test_sets": [["2007", "test"]]}  # fmt: skip
CONFIG = Options.of({"config": GIVEN, "classes": NAMES}, Path("a")).plain()
SAVED = {"model": NET.state_dict(), "config": CONFIG, "classes": NAMES, "step": 3}


def read_checkpoint(path):
    """Do what a test and a resumed run do with a checkpoint before they build its network."""
    saved = load_checkpoint(path)
    if "config" in saved:
        DetectorInfo.of(saved, path).prior_config()
        TrainedOn.of(saved, path)
        options = resolve({"root": "d", "save_folder": "w"}, Options.of(saved, path).plain())
        folder = test_folder(Call(test="x"), {}, options, path)
        assert folder.parents[1].name == "ss_predict" and ".." not in folder.parts, folder
    load_weights(NET, saved["model"], path)
    return saved


@target(PTH, 2000)
def checkpoint(folder):
    path = folder / "last.pth"
    save_checkpoint(path, SAVED)
    return path, partial(read_checkpoint, path)


@target()
def checkpoint_bytes(folder):
    path, read = checkpoint(folder)
    whole = str(load_checkpoint(path))

    def read_whole():
        assert str(read()) == whole, "damage is not noticed"

    return path, read_whole


@target()
def safetensors(folder):
    path = folder / "a.safetensors"
    about = {"config": CONFIG, "classes": NAMES, "keys": [*NET.state_dict()]}
    path.write_bytes(save(NET.state_dict(), {key: json.dumps(about[key]) for key in about}))
    return path, partial(read_checkpoint, path)


def load_onnx(data):
    return json.loads(onnx.load_from_string(data).metadata_props[0].value)


def dump_onnx(tree):
    file = io.BytesIO()
    write_onnx(file, json.dumps(tree), "loc conf")
    return file.getvalue()


@target((load_onnx, dump_onnx))
def exported(folder):
    path = folder / "a.onnx"
    path.write_bytes(dump_onnx(DESCRIPTION | {"version": "SSD_HarDNet68"}))

    def read():
        model = open_model(path, 1)
        model(graph_inputs([np.zeros((8, 8, 3), np.uint8)], model.info))

    return path, read


# ---------------------------------------------------------------- runs

def run_with_a_test(folder, name, data=True):
    dataset = VOCDetection(write_voc(folder / "data", {"test": BOXES}), [(None, "test")])
    test = folder / "run/ss_predict/best/test"
    found = [{"boxes": np.array([(4, 4, 39, 39), (1, 1, 9, 9)], np.float32), "labels": [2, 1],
              "scores": np.array([0.9, 0.5], np.float32)}] * 2  # fmt: skip
    origin = {"checkpoint": {"file": "best.pth", "sha256": "0"}, "dataset": "VOC", "sets": "test",
              "root": str(dataset.root), "overfit": 0, "classes": list(dataset.classes)}
    results = {**dataset.evaluate(found, test), **origin, "images": 2}
    save_detections(test / "detections.npz", dataset.ids, found, origin)
    (test / "results.json").write_text(json.dumps(results))
    if not data:
        shutil.rmtree(folder / "data")

    def read():
        test = score_again(open_test(folder / "run", None))
        score_tables(test, 0.4)
        if test.judged:
            error_tables(test.judged, test.results, test.dataset.ids,
                         list_mistakes(test.judged, 0.4), 0.4)  # fmt: skip

    return test / name, read


for name, codec in {"results.json": JSON, "detections.npz": NPZ, "curves.npz": NPZ}.items():
    TARGETS[name] = partial(run_with_a_test, name=name, data=name != "curves.npz"), codec, 500


@target(JSON_LINES)
def log(folder):
    path = folder / "log.jsonl"
    line = {"epoch": 1, "loss_loc": 1.5, "loss_conf": 2.5, "value": 0.5, "per_class": {"dog": 0.5}}
    path.write_text(f"{json.dumps(line)}\n" * 3)
    return path, lambda: training_tables(read_log(path))


@target(JSON)
def config(folder):
    run = folder / f"{Options.version}_{Options.size}/run"
    save_checkpoint(run / "last.pth", SAVED)
    (run / "config.json").write_text(json.dumps(CONFIG))
    given = {"save_folder": str(folder)}
    return run / "config.json", partial(find_checkpoint, Call(resume="auto"), given)


# ---------------------------------------------------------------- texts

@target(WORDS)
def class_map(folder):
    path = folder / "map.txt"
    path.write_text("dog=dog\ncat=person\nbus=bus\n")

    def read():
        for text in (str(path), path.read_bytes().decode(errors="surrogateescape")):
            match_classes(VOC_CLASSES, ["dog", "cat", "bus"], parse_class_map(text))

    return path, read


def call(path, command):
    """Give the words of a file to a command line; SystemExit 2 and an OSError refuse, too."""
    words = path.read_bytes().decode(errors="surrogateescape").split()
    silent = io.StringIO()
    with contextlib.redirect_stderr(silent), contextlib.redirect_stdout(silent):
        try:
            command(words)
        except SystemExit as error:
            assert error.code in (0, 2)
        except OSError as error:
            assert error.filename


@target(WORDS)
def options(folder):
    path = folder / "words"
    path.write_text("--root data\n-v SSD_HarDNet68\n-s 300\n-d VOC\n--classes a,b\n--lr 0.1\n"
                    "--train_sets 2007_trainval,2012_trainval\n--test_sets test\n--cache off\n-b 4"
                    "\n--resume auto\n--seed 1\n--compile false\n--device cpu\n--date x\n")
    return path, partial(call, path, lambda words: resolve(parse(words)[1]).plain())


def tool_options(folder, read, words):
    path = folder / "words"
    path.write_text(words)
    return path, partial(call, path, read)


for tool, words in {
    check: "--root d\n--classes a,b\n-s 300\n--strict\n--train_sets a,b",
    detect: "a.pth b.jpg\n--classes a,b\n--score_threshold 0.5\n--max_detections 5\n--save voc",
    export: "a.pth\n--classes a,b\n--format onnx\n--limit 3\n--tolerance 0.5\n--score_threshold 1",
}.items():
    TARGETS[tool.__name__] = partial(tool_options, read=tool.parse, words=words), WORDS, 300


# ---------------------------------------------------------------- the runner

def kilobytes(field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@contextlib.contextmanager
def limits():
    """Fail after `SECONDS` of a processor; on Linux also if memory rises by `MEGABYTES`."""
    def stop(*_):
        pytest.fail(f"a reading takes more than {SECONDS} s of a processor")

    linux = os.path.exists("/proc/self/clear_refs")
    if linux:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        before, most = kilobytes("VmRSS"), kilobytes("VmSize") + 4 * MEGABYTES * 1024
        resource.setrlimit(resource.RLIMIT_AS, (most * 1024, -1))
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
    if linux:
        rise = (kilobytes("VmHWM") - before) // 1024
        assert rise < MEGABYTES, f"a reading takes {rise} MB"


@pytest.fixture(autouse=True)
def at_home(monkeypatch, tmp_path):
    """Let mutated paths lead to no other files, and do not wait for the disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(os, "fsync", lambda _: None)


def fuzz(name, folder, inputs=None):
    write, codec, most = TARGETS[name]
    path, read = write(folder)
    whole = path.read_bytes()
    read()

    def read_mutated(changes):
        data = mutate(whole, changes, codec)
        path.write_bytes(data)
        try:
            with limits(), contextlib.suppress(UserError):
                read()
        except BaseException as error:
            raise AssertionError(f"after {changes} {path.name} is {data[:2000]!r}") from error

    for changes in replacements(whole, codec) if codec and not inputs else ():
        read_mutated(changes)
    given(edits(codec))(settings(max_examples=inputs or most, derandomize=True, deadline=None,
                                 database=None, phases=[Phase.generate, Phase.shrink],
                                 suppress_health_check=[*HealthCheck])(read_mutated))()


@pytest.mark.parametrize("name", TARGETS)
def test_a_mutated_file_is_read_whole_or_refused_in_a_sentence(name, tmp_path):
    fuzz(name, tmp_path, 40)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TARGETS)
def test_many_mutated_files(name, tmp_path):
    fuzz(name, tmp_path)
