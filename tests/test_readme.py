"""Every command of the README runs, on small data where the real ones would be downloaded."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import commands, write_voc

from data import DATASETS
from engine.optim import LR_MILESTONES
from engine.options import OPTIONS, default_text
from layers.detect import SUPPRESSION, DetectConfig
from models import BACKBONES, build_net

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = commands("README.md")
INLINE = [shlex.split(text) for text in re.findall(r"`(python -m [^`]+)`", README)]
SMALL = ["--max_iters", "1", "-b", "2", "--num_workers", "0", "--device", "cpu"]


def command(*words: str) -> list[str]:
    """Return the one command of the README that has all of these words."""
    (found,) = [c for c in (*COMMANDS, *INLINE) if set(words) <= set(c)]
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory, request):
    """A user's home with a devkit in ~/data, a folder of their own, and pretrained base weights."""
    home = tmp_path_factory.mktemp("home")
    objects = [("person", (5, 5, 60, 60)), ("dog", (30, 10, 90, 70))]
    for year, sets in (("2007", ("trainval", "test")), ("2012", ("trainval",))):
        samples = {s: {f"{year}{s}{i}": objects for i in range(2)} for s in sets}
        write_voc(home / "data" / "VOCdevkit" / f"VOC{year}", samples)
    samples = {s: {f"{s}{i}": objects for i in range(2)} for s in ("trainval", "test")}
    write_voc(home / "FOLDER", samples)
    (home / "weights").mkdir()
    base = build_net("SSD_HarDNet68", 300, 2).base
    torch.save(base.state_dict(), home / "weights" / "hardnet68_base_bridge.pth")
    return home


def run(home: Path, command: list[str], *more: str) -> str:
    """One command as typed in a clone, from the user's home."""
    program = [sys.executable if command[0] == "python" else str(ROOT / command[0])]
    words = [str(ROOT / w) if w.endswith(".py") else w for w in command[1:]]
    done = subprocess.run(
        [*program, *words, *more], cwd=home,
        env={**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"},
        capture_output=True, text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_command_is_run_by_a_test():
    """A command that is added to the README must be added here, and to a test below."""
    assert [c[:3] for c in COMMANDS] == [
        ["./make.sh", "demo"],
        ["./make.sh", "test"],
        *(["python", "-m", "tools.weights"] for _ in range(4)),
        ["python", "-m", "tools.check"],
        ["python", "train_test.py", "--root"],
        ["data/scripts/VOC2007.sh"],
        ["data/scripts/VOC2012.sh"],
        *(["python", "train_test.py", "-d"] for _ in range(2)),
        ["python", "train_test.py", "--test"],
        ["python", "-m", "tools.report"],
        ["python", "-m", "tools.sheet"],
        ["python", "-m", "data.voc_eval"],
        *(["python", "-m", "data.coco_eval"] for _ in range(2)),
        ["python", "utils/build.py"],
        ["python", "utils/build.py", "--check"],
    ]


def test_demo_ends_with_a_score_per_class_and_an_image(home, tmp_path):
    small = ["--epochs", "1", "--trainval", "8", "--test", "4", "--output", str(tmp_path)]
    output = run(home, command("./make.sh", "demo"), *small)
    assert re.search(r"^star +\d\.\d{3} +\d\.\d{3}$", output, re.MULTILINE)
    assert (tmp_path / "detections.png").stat().st_size > 10_000


def test_ci_runs_the_test_command():
    assert "./make.sh test" in (ROOT / ".ci" / "run").read_text()


def test_training_testing_and_resuming_as_written(home):
    (train,) = [each for each in COMMANDS if each[-2:] == ["-s", "512"]]
    assert "tensors of the base network" in run(home, train, *SMALL)
    (run_dir,) = (home / "weights" / "SSD_HarDNet68_512").iterdir()
    more = ["--max_iters", "2", "--num_workers", "0", "--device", "cpu"]
    assert "resumed at step 1" in run(home, command("--resume", "auto"), *more)

    def of_run(words: list[str]) -> list[str]:
        return [re.sub(r"/RUN\b", f"/{run_dir.name}", word) for word in words]

    test = of_run(command("--test"))
    run(home, test, "--num_workers", "0", "--device", "cpu")
    checkpoint = Path(test[-1])
    folder = home / checkpoint.parent / "ss_predict" / checkpoint.stem / "2007_test"
    results = json.loads((folder / "results.json").read_text())
    assert results["metric"] == "VOC07 11-point AP@.5"
    run(home, of_run(command("tools.report")))
    run(home, of_run(command("tools.sheet")))
    assert list((home / "weights").rglob("*.html")) and list((home / "weights").rglob("*.png"))


def test_own_data_are_checked_trained_on_and_scored(home):
    assert "2 classes" in run(home, command("train_test.py", "FOLDER"), *SMALL)
    run(home, command("tools.check"))
    assert (home / "check.html").stat().st_size
    (made,) = (home / "weights" / "SSD_HarDNet68_300").glob("*/ss_predict/final/test")
    shutil.copytree(made, home / "DETECTIONS_DIR")
    assert "person" in run(home, command("data.voc_eval"))


def test_coco_results_are_scored(home, coco_folder):
    annotations = coco_folder / "annotations" / "instances_val2017.json"
    shutil.copy(annotations, home / "ANNOTATIONS.json")
    found = [{"image_id": 4, "category_id": 3, "bbox": [20, 10, 40, 40], "score": 0.9}]
    (home / "RESULTS.json").write_text(json.dumps(found))
    by_hotcoco = command("data.coco_eval", "hotcoco")
    twelve = run(home, by_hotcoco[: by_hotcoco.index("--eval-backend")])
    assert twelve.count("Average Precision") == 6
    if importlib.util.find_spec("hotcoco"):
        assert run(home, by_hotcoco) == twelve


def test_traffic_lists_every_layer(home):
    assert "base.8.layers.3.conv" in run(home, command("tools.traffic"))


def test_weights_are_listed_inspected_and_converted(home):
    listing, download = command("tools.weights", "list"), command("tools.weights", "download")
    assert download[4] in run(home, listing)  # tests/test_pretrained.py downloads
    shutil.copy(home / "weights" / "hardnet68_base_bridge.pth", home / "FILE")
    inspect = command("tools.weights", "inspect")
    assert "SSD_HarDNet68, SSD_HarDNet68bn, RFB_HarDNet68" in run(home, inspect)
    if importlib.util.find_spec("safetensors"):
        shutil.copy(home / "FILE", home / "IN.pth")
        names = {"IN": "IN.pth", "OUT": "OUT.safetensors"}
        convert = [names.get(word, word) for word in command("tools.weights", "convert")]
        run(home, convert)
        inspect[-1] = "OUT.safetensors"
        assert "SSD_HarDNet68, SSD_HarDNet68bn, RFB_HarDNet68" in run(home, inspect)


def test_building_says_what_serves(home):
    build, check = COMMANDS[-2:]
    assert "utils.nms._cpu_nms: " in run(home, build)
    checked = run(home, check).splitlines()
    assert [line.split(":")[0] for line in checked] == ["NMS on the CPU", "NMS on the GPU"]


def recipe_table() -> str:
    """Return the README's table of the recipe; after a change paste it there."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for spec in OPTIONS.values():
        if spec.metadata["group"] == "recipe" and default_text(spec):
            flags = ", ".join(f"`{flag}`" for flag in spec.metadata["flags"])
            meaning = spec.metadata["help"].replace("%%", "%")
            lines.append(f"| {flags} | {default_text(spec)} | {meaning} |")
    return "\n".join(lines)


def test_the_table_of_the_recipe_is_that_of_the_options():
    assert recipe_table() in README
    assert LR_MILESTONES == (0.6, 0.8, 0.9) and "60, 80 and 90 %" in README


def test_options_of_detection_are_the_defaults():
    for option, field in (("score_threshold", "conf_thresh"), ("max_detections", "top_k")):
        row = next(line for line in README.splitlines() if line.startswith(f"| `--{option} "))
        voc, coco = (f"{DATASETS[name].detection[field]:g} ({name})" for name in ("VOC", "COCO"))
        assert f": {voc}, {coco}" in row
        assert option == "score_threshold" or f"at most {DetectConfig.per_class} of a class" in row
    row = next(line for line in README.splitlines() if line.startswith("| `--nms "))
    assert re.findall(r"soft[-\w]*", row)[:2] == list(SUPPRESSION)[1:]


def test_every_benchmark_is_listed_with_a_command_that_is_there():
    text = (ROOT / "benchmarks" / "README.md").read_text("utf-8")
    listed = set(re.findall(r"`python -m benchmarks\.(\w+)", text))
    parts = {"__init__", "gather", "harness", "on_gpu", "roofline", "routes"}
    assert listed == {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - parts


def test_table_of_networks_is_that_of_the_counts():
    """The figures are docs/traffic.md's, which is compared with `python -m tools.traffic`."""
    counted = {}
    for line in (ROOT / "docs" / "traffic.md").read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if cells and cells[0] in BACKBONES:
            parameters, macs = (int(cell.replace(",", "")) for cell in cells[2:4])
            figures = f"{parameters / 1e6:.1f}", f"{macs / 1e9:.1f}"
            counted.setdefault(cells[0], []).append(figures)
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \| ([^|]+) \|$", README, re.MULTILINE)
    said = {}
    for name, *cells in rows:
        parameters, macs = (re.findall(r"\d+\.\d", cell) for cell in cells)
        said[name] = [*zip(parameters, macs, strict=True)]
    assert said == counted and set(said) == set(BACKBONES)
