"""Two tests compared: against scoring each draw anew, hotcoco's compare, and by hand."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from coco_files import CATEGORIES, annotation, write_val2017
from conftest import commands, write_voc
from test_bootstrap import coco_anew, scored_anew
from test_report import EMPTY, Page, change, random_samples, scatter, table, write_results

from data import bootstrap
from data.coco import COCODetection
from data.coco_eval import evaluate_coco, load_backend
from data.coco_json import read_annotations
from data.coco_results import COCOResults
from data.voc0712 import VOCDetection
from data.voc_comp4 import read_comp4
from engine.evaluate import score
from tools import report
from tools.against import MEAN, NO_EVIDENCE, check_same, compare, moved_images
from tools.results import open_test
from utils.errors import UserError

IMAGES = 30


@pytest.fixture(scope="module")
def voc(tmp_path_factory):
    """The folders of two tests, the second one worse, and their data set."""
    folder, samples = tmp_path_factory.mktemp("voc"), random_samples(2, IMAGES, "ab")
    dataset = VOCDetection(write_voc(folder / "data", {"test": samples}), [(None, "test")])
    found = scatter(dataset, 1)
    worse = [{**each, "scores": np.random.default_rng(n).random(len(each["scores"]))}
             for n, each in enumerate(found)]
    for each, target in zip(found, map(dataset.target, range(IMAGES)), strict=True):
        each["boxes"][:2], each["labels"][:2] = target[:, :4], target[:, 4]  # right, and the best
        each["scores"][:2] = 0.9 + each["scores"][:2] / 10
    return *(write_results(folder / name, dataset, detections, "VOC", "test")
             for name, detections in (("A", found), ("B", worse))), dataset


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """As `voc`, in COCO layout, with crowds; the tests are about as good as each other."""
    folder, rng, objects = tmp_path_factory.mktemp("coco"), np.random.default_rng(3), []
    for n in range(3 * IMAGES):
        box = [*rng.integers(0, (30, 15)), *rng.integers(8, 25, 2)]
        objects.append(annotation(n + 1, 10 + n // 3, [int(side) for side in box],
                                  CATEGORIES[n % 2]["id"], iscrowd=int(rng.random() < 0.1)))
    root = write_val2017(folder / "data", objects, range(10, 10 + IMAGES))
    dataset = COCODetection(root, [("2017", "val")])
    return *(write_results(folder / name, dataset, scatter(dataset, seed), "COCO", "2017_val")
             for name, seed in (("A", 1), ("B", 2))), dataset


def open_both(tests):
    return [open_test(folder, None) for folder in tests[:2]]


def drawn(tests, monkeypatch, draws=5):
    """Weights, and by name the differences of those draws."""
    weights = bootstrap.draw(IMAGES, draws, 1)
    with monkeypatch.context() as patch:
        patch.setattr(bootstrap, "draw", lambda _: weights)
        patch.setattr(bootstrap, "interval", lambda values: values)
        changes = {each.name: each.interval for each in compare(*open_both(tests))}
    return weights.astype(int), changes


def test_draws_are_those_of_scoring_both_voc_tests_anew(voc, monkeypatch):
    *folders, dataset = voc
    weights, changes = drawn(voc, monkeypatch)
    found = [read_comp4(folder, "test", dataset.classes, dataset.ids)[0] for folder in folders]
    for n, row in enumerate(weights):
        a, b = (scored_anew(each, dataset.annotations, dataset.classes, row)["area"]
                for each in found)
        assert changes[MEAN][n] == pytest.approx(a["mean"] - b["mean"], abs=1e-5)
        for name, ap in a["per_class"].items():
            assert changes[name][n] == pytest.approx(ap - b["per_class"][name], abs=1e-5)


def test_draws_are_those_of_scoring_both_coco_tests_anew(coco, tmp_path, monkeypatch):
    weights, changes = drawn(coco, monkeypatch)
    document = json.loads(next((coco[2].root / "annotations").iterdir()).read_text())
    assert changes.pop("oar") is None  # it has no object
    for n, row in enumerate(weights):
        scores = []
        for folder in coco[:2]:
            results = json.loads((folder / "detections_val2017_results.json").read_text())
            several, found = coco_anew(document, results, row)
            (tmp_path / "truth.json").write_text(json.dumps(several))
            scores.append(evaluate_coco(found, tmp_path / "truth.json", intervals=False))
        a, b = ({MEAN: each["stats"][0], **each["per_category"]} for each in scores)
        for name, difference in changes.items():
            assert difference[n] == pytest.approx(a[name] - b[name])


def test_difference_and_interval_are_those_of_hotcoco(coco, monkeypatch):
    hotcoco = pytest.importorskip("hotcoco")
    truth = read_annotations(next((coco[2].root / "annotations").iterdir()))
    evaluate, _ = load_backend("hotcoco")
    both = []
    for folder in coco[:2]:
        content = json.loads((folder / "detections_val2017_results.json").read_text())
        found = COCOResults.read("results", content)
        image, category = (1 + each for each in found.positions_in(truth, "results"))
        both.append(evaluate(truth, found._replace(image_ids=image, category_ids=category)))
    said, found = hotcoco.compare(*reversed(both), n_bootstrap=4000), []
    # hotcoco 1.3.0 counts an image that it draws several times only once: its interval is shorter.
    draws = bootstrap.draw(IMAGES, 4000, 1)
    for weights in (draws, np.minimum(draws, 1)):
        monkeypatch.setattr(bootstrap, "draw", lambda _, weights=weights: weights)
        found.append(compare(*open_both(coco))[0])
    mean, once = found
    assert mean.name == MEAN and mean.a - mean.b == pytest.approx(said["deltas"]["AP"])
    ends = [said["ci"]["AP"][end] for end in ("lower", "upper")]
    close = pytest.approx(ends, abs=0.05 * (ends[1] - ends[0]))
    assert once.interval == close or mean.interval == close


def test_page_and_console_tell_which_is_better(voc, tmp_path, capsys):
    a, b, dataset = voc
    page = tmp_path / "report.html"
    call = [str(a), "--against", str(b), "--output", str(page), "--examples", "2"]
    assert report.main(call) == 0
    out = capsys.readouterr().out.splitlines()
    (mean,) = (line for line in out if line.startswith(MEAN))
    said = [json.loads((folder / "results.json").read_text()) for folder in (a, b)]
    values = [each["value"] for each in said]
    assert mean.endswith("A is better") and f"{values[0]:.4f}   {values[1]:.4f}" in mean
    assert sum("a is better" in line.lower() for line in out) == 3
    rows = {row["class"]: row for row in table(tmp_path, "against")}
    assert float(rows[MEAN]["A - B"]) == pytest.approx(values[0] - values[1], abs=1e-5)
    low, high = (float(rows[MEAN][end]) for end in ("95 % from", "to"))
    assert 0 < low < values[0] - values[1] < high
    figures = [attributes for attributes, _ in Page(page).all("figure")
               if attributes.get("class") == "pair"]
    moved = moved_images(*open_both(voc), 0.4)
    assert len(table(tmp_path, "against_images")) == len(moved) and 2 <= len(figures) <= 4
    assert Page(page).all("li")[0][1].startswith("A: net.pth on test")
    assert str(b) in page.read_text()
    rows = {row["class"]: row for row in table(tmp_path, "classes")}
    bounds = [float(rows[MEAN][end]) for end in ("95 % from", "to")]
    assert bounds == pytest.approx(said[0]["interval"], abs=1e-5)
    assert float(rows["a"]["to"]) == pytest.approx(said[0]["per_class_interval"]["a"][1], abs=1e-5)
    assert f"95 % interval {bounds[0]:.4f} to {bounds[1]:.4f}" in page.read_text()


def test_commands_of_the_documentation_run(voc, monkeypatch, tmp_path, capsys):
    found = commands("docs/reading_a_report.md")
    assert [command[:3] for command in found] == 3 * [["python", "-m", "tools.report"]]
    monkeypatch.chdir(tmp_path)
    for folder, name in zip(voc, ("RUN", "OTHER"), strict=False):
        shutil.copytree(folder, tmp_path / "weights" / "SSD_HarDNet68_300" / name)
    for words in found:
        if "--accept" in words:
            page = next(Path("weights").rglob("report.html"))
            ticks = [a["value"] for a, _ in Page(page).all("input")]
            Path("accepted.json").write_text(f"[{', '.join(ticks)}]")
        assert report.main(words[3:]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "A is better" in out and f"with {len(ticks)} new objects" in out and len(ticks) > 5


def test_a_test_against_itself_has_no_evidence(coco, capsys, tmp_path):
    a, page = str(coco[0]), tmp_path / "report.html"
    assert report.main([a, "--against", a, "--output", str(page)]) == 0
    out = capsys.readouterr().out.splitlines()
    shown = {line.split()[0]: line for line in out[-5:-1]}
    assert all(shown[name].endswith(NO_EVIDENCE) for name in ("kite", "dog", MEAN))
    assert shown["oar"].endswith("no objects") and "nan" not in "".join(out)
    assert table(tmp_path, "against_images") == []


def test_images_that_changed_are_those_with_other_errors(tmp_path):
    samples = {name: [("a", (11, 11, 40, 40), False)] for name in ("one", "two", "three")}
    dataset = VOCDetection(write_voc(tmp_path / "data", {"test": samples}), [(None, "test")])
    right = {"boxes": np.float32([(10, 10, 39, 39)]), "scores": [0.9], "labels": [1]}
    wrong = {"boxes": np.float32([(60, 10, 79, 39)] * 2), "scores": [0.9] * 2, "labels": [1] * 2}
    weak = {**wrong, "scores": [0.1] * 2}
    folders = [write_results(tmp_path / name, dataset, found, "VOC", "test")
               for name, found in (("A", [right, EMPTY, right]), ("B", [right, weak, wrong]))]
    (moved,) = moved_images(*open_both(folders), 0.4)
    assert (dataset.ids[moved.image], moved.a, moved.b) == ("three", (1, 0, 0), (0, 2, 1))
    assert moved.gain == 3


@pytest.mark.parametrize("kind", ["voc", "coco"])
def test_the_log_of_a_test_has_the_intervals(kind, request, tmp_path, caplog):
    folder, _, dataset = request.getfixturevalue(kind)
    test = open_test(folder, None)
    origin = {"thresholds": {"score": 0.01}}
    with caplog.at_level("INFO", "ssd"):
        said = score(dataset, test.detections, origin, tmp_path, "net")
    lines = [record.getMessage() for record in caplog.records]
    assert f": {said['value']:.4f}, 95 %: {bootstrap.text(said['interval'])} (30" in lines[-1]
    name = dataset.classes[0]
    bounds = said["per_class_interval"][name]
    wanted = f"{said['per_class'][name]:.4f}, 95 %: {bootstrap.text(bounds)}"
    assert f"  {name:20} {wanted}" in lines and bounds[0] < bounds[1]


def test_other_settings_and_notes_of_the_other_test_are_told(voc, tmp_path):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in voc[:2]]
    other = {"thresholds": {"score": 0.03}, "views": {"tiles": 300}}
    path, kept = folders[1] / "results.json", folders[1] / "detections.npz"
    path.write_text(json.dumps({**json.loads(path.read_text()), **other, "value": 0.25}))
    arrays = dict(np.load(kept))
    made_by = json.loads(str(arrays["made_by"])) | other
    np.savez(kept, **arrays | {"made_by": np.array(json.dumps(made_by))})
    notes = "\n".join(report.write_report(folders[0], against=folders[1:])[1])
    assert "thresholds: score is 0.01 for A and 0.03 for B" in notes
    assert "views: tiles is 0 for A and 300 for B" in notes and "suppression" not in notes
    assert "B: results.json says 0.2500, but its detections score" in notes


@pytest.mark.parametrize("what", ["images", "classes", "annotations", "metrics", "data"])
def test_tests_on_other_data_are_refused_in_a_sentence(what, voc, coco, tmp_path, capsys):
    a, b, dataset = voc
    other = shutil.copytree(dataset.root, tmp_path / "data")
    names, sets = dataset.classes, [(None, "test")]
    if what == "images":
        lists = next(other.rglob("test.txt"))
        lists.write_text("".join(lists.read_text().splitlines(True)[1:]))
    elif what == "annotations":
        path = next(other.rglob("p03.xml"))
        path.write_text(path.read_text().replace("<name>a<", "<name>b<"))
    elif what == "classes":
        names = tuple(reversed(names))
    changed = VOCDetection(other, sets, classes=names)
    folder = write_results(tmp_path / "out", changed, scatter(changed), "VOC", "test")
    if what == "metrics":
        folder = coco[0]
    elif what == "data":
        change(folder, root=str(tmp_path / "gone"))
    for tests in ((a, folder), (folder, a)):
        assert report.main([str(tests[0]), "--against", str(tests[1]), "--output",
                            str(tmp_path / "page.html")]) == 2  # fmt: skip
        error = capsys.readouterr().err
        fix = "in another order); test both with the same --classes"
        assert error.count("\n") == 1 and str(folder) in error
        assert (fix if what == "classes" else "--root") in error
        assert what == "data" or what in error
    assert not (tmp_path / "page.html").exists()
    with pytest.raises(UserError, match=Path(folder).name):
        check_same(*open_both((folder, a)))
