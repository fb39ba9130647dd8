"""The pages of docs/: links lead somewhere, code runs, and commands are known to the programs."""

import json
import re
import shlex
import shutil
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest
import torch
from conftest import blocks, commands
from layouts import LAYOUTS
from tiny import TINY

import train_test
from data import DATASETS, DetectionData, build_dataset, default_sets, find_layout
from models import BACKBONES, build_net
from models.pretrained import published, published_bases
from tools import check, detect, export, sheet, split, weights
from train_test import main

ROOT = Path(__file__).parent.parent
ROOMS = "utils|data|layers|models|inference|engine|tools|demo|docs|benchmarks|tests"
PAGES = sorted([*ROOT.glob("*.md"), *(path for room in ("docs", "weights", "benchmarks")
                                      for path in (ROOT / room).rglob("*.md"))])


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_and_pictures_lead_to_files(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_modules_and_scripts_that_are_named_are_there(page):
    text = page.read_text("utf-8")
    for name in re.findall(rf"python -m ((?:{ROOMS})\.\w+)", text):
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name
    for name in re.findall(rf"`((?:{ROOMS})/\w+\.py)`", text):
        assert (ROOT / name).is_file(), name


def test_pages_that_messages_name_are_there():
    named = {
        name
        for path in ROOT.rglob("*.py")
        if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        for name in re.findall(r"\bdocs/\w+\.md\b", path.read_text("utf-8"))
    }
    assert {"docs/own_data.md", "docs/exporting.md", "docs/many_gpus.md"} <= named
    assert all((ROOT / name).is_file() for name in named)


def test_a_backbone_is_added_as_described(monkeypatch):
    monkeypatch.setattr("models.BACKBONES", dict(BACKBONES))
    before = set(BACKBONES)
    names: dict = {"__name__": "example"}
    try:
        exec(blocks("docs/extending.md", "python")[0], names)
        net = names["net"].eval()
        with torch.inference_mode():
            loc, conf = net(torch.zeros(1, 3, 300, 300))
        assert loc.shape == (1, 11620, 4) and conf.shape == (1, 11620, 21)
        assert build_net("SSD_small", 512, 3).num_classes == 3
    finally:
        for name in set(BACKBONES) - before:
            del BACKBONES[name]


def test_a_data_set_is_converted_as_described(tmp_path):
    names: dict = {}
    exec(blocks("docs/extending.md", "python")[1], names)
    for name in ("one.png", "two.png"):
        cv2.imwrite(str(tmp_path / name), np.zeros((40, 60, 3), np.uint8))
    records = {"one.png": [("dog", 5, 6, 25, 36), ("cat", 0, 0, 10, 10)], "two.png": []}
    names["to_yolo"](records, {"one.png": (60, 40), "two.png": (60, 40)}, tmp_path)
    row, _ = find_layout(tmp_path)
    dataset = build_dataset(row, tmp_path, [(None, "split_train"), (None, "split_val")])
    assert dataset.classes == ("cat", "dog") and not dataset.skipped
    one, two = (dataset.target(dataset.ids.index(id)) for id in ("one", "two"))
    np.testing.assert_allclose(one, [[5, 6, 24, 35, 2], [0, 0, 9, 9, 1]], atol=1e-4)
    assert two.shape == (0, 5)


def test_a_third_data_set_is_a_file_and_a_row(tmp_path, monkeypatch, capsys):
    """It is read, trained on for two steps and tested, through the program."""
    reader, row = blocks("docs/extending.md", "python")[2:4]
    for name in ("train", "test"):
        rows = []
        for i in range(3):
            image = np.full((60, 80, 3), 40 * i, np.uint8)
            cv2.imwrite(str(tmp_path / f"{name}{i}.png"), image)
            rows += [f"{name}{i}.png,80,60,dog,5,6,40,50", f"{name}{i}.png,80,60,cat,30,10,70,30"]
        (tmp_path / f"{name}.csv").write_text("\n".join(rows[:-1]) + "\n")
    module = ModuleType("data.tables")
    exec(reader, vars(module))
    monkeypatch.setitem(sys.modules, "data.tables", module)
    monkeypatch.setitem(BACKBONES, "tiny", TINY)
    monkeypatch.setitem(DATASETS, "tables", None)  # taken out again after the test
    exec(row, {})
    assert find_layout(tmp_path) == ("tables", "tables")
    dataset = build_dataset("tables", tmp_path, default_sets("tables", tmp_path)[0])
    assert isinstance(dataset, DetectionData)
    assert dataset.classes == ("cat", "dog") and len(dataset.truth().boxes) == 5
    dataset.keep_first(1)
    assert dataset.ids == ["train0.png"] and dataset.target(0).shape == (2, 5)
    common = ["--root", str(tmp_path), "--device", "cpu", "--num_workers", "0"]
    run = ["-v", "tiny", "-s", "300", "-b", "2", "-max", "2", "--date", "a",
           "--save_folder", str(tmp_path / "out")]  # fmt: skip
    assert main([*run, *common, "--max_iters", "2"]) == 0, capsys.readouterr().err
    path = tmp_path / "out" / "tiny_300" / "a" / "Final_tiny_tables.pth"
    assert main(["--test", str(path), *common]) == 0, capsys.readouterr().err
    results = json.loads((path.parent / "ss_predict" / path.stem / "test/results.json").read_text())
    assert list(results["per_class"]) == ["cat", "dog"] and results["images"] == 3


def test_a_command_is_a_file_with_a_main(voc_folder, capsys):
    text = blocks("docs/extending.md", "python")[-1]
    names = {"__name__": "tools.count", "__doc__": "Count."}
    exec(text, names)
    assert names["main"](["--root", str(voc_folder)]) == 0
    assert capsys.readouterr().out == "6 images, 9 objects\n"
    assert names["main"](["--root", str(voc_folder / "none")]) == 2
    assert str(voc_folder / "none") in capsys.readouterr().err


def test_own_data_are_split_checked_trained_on_and_used_as_written(tmp_path, monkeypatch, capsys):
    """Every command of docs/own_data.md, on a small network in place of the one it names."""
    programs = {"train_test.py": train_test} | {
        f"tools.{module.__name__.rpartition('.')[2]}": module
        for module in (check, detect, export, sheet, split, weights)
    }
    monkeypatch.setitem(BACKBONES, "SSD_HarDNet68", TINY)
    monkeypatch.chdir(tmp_path)
    LAYOUTS["xml-folders"].write(Path("FOLDER"))
    run, ran = "", []
    for _, *words in commands("docs/own_data.md"):
        program = words.pop(0) if words[0] != "-m" else words.pop(1)
        ran.append(program)
        if program == "tools.export" and not all(map(find_spec, ("onnxscript", "onnxruntime"))):
            continue
        words = [word.replace("/RUN", f"/{run}") for word in words if word != "-m"]
        if program in ("train_test.py", "tools.detect"):
            words += ["--device", "cpu"] + ["--num_workers", "0"] * (program == "train_test.py")
        if "-max" in words:
            words += ["--max_iters", "1", "-b", "2", "--amp", "off"]
        if "--overfit" in words:
            words[words.index("--overfit") + 1] = "2"
        if "IMAGES" in words:
            shutil.copytree("FOLDER/images", "IMAGES")
        assert programs[program].main(words) == 0, (program, words, capsys.readouterr().err)
        run = run or next(Path("weights/SSD_HarDNet68_300").iterdir()).name
    assert set(ran) == set(programs) and Path("check.html").stat().st_size > 1000
    folder = Path("weights/SSD_HarDNet68_300", run, "ss_predict", "best", "split_val")
    assert (folder / "detections.png").exists()


def test_the_accepted_objects_of_bccd_lie_in_its_photographs():
    rows = json.loads((ROOT / "docs/bccd/accepted.json").read_text("utf-8"))
    assert Counter(row["class"] for row in rows) == {"RBC": 203, "WBC": 2, "Platelets": 16}
    x, y, width, height = np.array([row["bbox"] for row in rows]).T
    # The photographs have 640 x 480 pixels; a box may reach over their border.
    assert (np.minimum(x + width, 640) - x.clip(0) > 20).all() and (width < 300).all()
    assert (np.minimum(y + height, 480) - y.clip(0) > 20).all() and (height < 300).all()
    assert all(0.4 <= row["score"] <= 1 for row in rows if row["class"] != "Platelets")
    assert len({(row["image"], *row["bbox"]) for row in rows}) == 221


def test_a_perfect_detector_of_bccd_scores_as_told(capsys):
    (code,) = blocks("docs/bccd.md", "python")
    exec(code, {})
    said = (ROOT / "docs/bccd.md").read_text("utf-8").partition("Its 11-point AP is")[2]
    told = [float(value) for value in re.findall(r"0\.\d{3}", said)[:6]]
    np.testing.assert_allclose([*map(float, capsys.readouterr().out.split())], told, atol=2e-3)


def test_contiguous_batch_norms_are_exact_as_reproduced(capsys):
    with torch.random.fork_rng():
        exec(blocks("docs/performance.md", "python")[0], {})
    contiguous, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert contiguous < 1e-6 and last < 5e-3


def test_commands_that_reproduce_name_what_there_is():
    """tests/test_readme.py and tests/test_pretrained.py run the same commands on small data."""
    from engine.options import parser

    parse = parser().parse_args
    found = commands("docs/reproducing.md")
    assert len(found) == 5
    for command in found:
        if "tools.weights" in command:
            assert command[:4] == ["python", "-m", "tools.weights", "download"]
            row = published(command[4])
        else:
            assert command[:2] == ["python", "train_test.py"]
            given = parse(command[2:])
            assert given.version in row.versions
            if file := getattr(given, "test", None):
                assert Path(file).name == row.file
            else:  # --basenet auto takes it
                assert row == published_bases(given.version)[0]


def test_recipes_of_the_table_are_options_of_training():
    from engine.options import parse

    (block,) = blocks("docs/recipes.md")
    command = shlex.split(block.replace("\\\n", " "))
    rows = re.findall(r"^\| .* \| `(--.*)` \|$", (ROOT / "docs/recipes.md").read_text("utf-8"),
                      re.MULTILINE)
    assert command[:2] == ["python", "train_test.py"] and len(rows) == 9
    given = [parse([*command[2:], *row.split()])[1] for row in rows]
    assert len({tuple(sorted(map(str, each.items()))) for each in given}) == 9


def test_exporting_as_described(voc_folder, tmp_path, monkeypatch, capsys):
    """Every command of docs/exporting.md but pip's, on the tiny network."""
    for package in ("onnxscript", "onnxruntime", "openvino", "nncf"):
        pytest.importorskip(package)
    from exports import write_checkpoint

    from inference.proof import TOLERANCE

    monkeypatch.setitem(BACKBONES, "tiny", TINY)
    # Random weights have no AP to lose, and boxes at every threshold.
    for precision in ("bf16", "int8"):
        loose = replace(TOLERANCE[precision], matched=0.5, ap=100)
        monkeypatch.setitem(TOLERANCE, precision, loose)
    checkpoint = write_checkpoint(tmp_path / "best.pth", voc_folder)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FOLDER").symlink_to(voc_folder)
    (tmp_path / "IMAGES").symlink_to(voc_folder / "JPEGImages")
    programs = {"train_test.py": train_test, "tools.detect": detect, "tools.export": export}
    found = [words for python, *words in commands("docs/exporting.md") if python == "python"]
    assert len(found) == 6
    for words in found:
        program = programs[words[1] if words[0] == "-m" else words[0]]
        arguments = words[2:] if words[0] == "-m" else words[1:]
        arguments = [str(checkpoint) if word == "CHECKPOINT" else word for word in arguments]
        assert program.main(arguments) == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "detector.onnx.json").exists()


def test_cards_have_the_figures_of_the_readme():
    readme, cards = ((ROOT / p).read_text("utf-8") for p in ("README.md", "docs/model_cards.md"))
    for name in ("SSD512-HarDNet68", "SSD512-HarDNet85"):
        row = re.search(rf"^\| \*\*{name}\*\* \|(.+)\|$", readme, re.MULTILINE)[1]
        figures = [cell.strip(" *") for cell in row.split("|")]
        card = cards.partition(f"## {name}\n")[2]
        line = re.search(r"^\| published \|(.+)\|$", card, re.MULTILINE)[1]
        assert [cell.strip() for cell in line.split("|")] == figures
    for name in ("RFBNet512-HarDNet68", "RFBNet512-HarDNet85", "SSD512-VGG16", "SSD513-ResNet101"):
        value = re.search(rf"^\| {name} \| ([\d.]+) \|", readme, re.MULTILINE)[1]
        assert value in cards
