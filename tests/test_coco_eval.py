"""COCO scores: the published numbers on real detections, and hand-computed small cases."""

import importlib.metadata
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from data import bootstrap
from data.coco_eval import BACKENDS, evaluate_coco, load_backend, main, notes
from data.coco_json import join, read_annotations
from data.coco_results import COCOResults
from data.curves import SIZES, load_curves
from utils.errors import UserError

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(annotation file, results file, the twelve expected numbers) of 79 images of val2017."""
    figures = np.load(GOLDENS / "coco_eval_val2017.npz")
    ids, sizes, categories, truth_ids = (
        figures[key].tolist() for key in ("image_id", "image_size", "category_id", "truth_id"))

    def records(kind, fields, **more):
        columns = [figures[f"{kind}_{field}"].tolist() for field in fields]
        return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]

    truth = records("truth", ("image_id", "category_id", "bbox", "area", "iscrowd"))
    document = {
        "images": [{"id": id, "width": w, "height": h} for id,
                   (w, h) in zip(ids, sizes, strict=True)],
        "categories": [{"id": id, "name": f"category {id}"} for id in categories],
        "annotations": [{"id": id} | t for id, t in zip(truth_ids, truth, strict=True)]}
    folder = tmp_path_factory.mktemp("golden")
    (folder / "truth.json").write_text(json.dumps(document))
    results = records("result", ("image_id", "category_id", "bbox", "score"))
    (folder / "results.json").write_text(json.dumps(results))
    expected = json.loads((GOLDENS / "coco_eval_val2017_stats.json").read_text())
    return folder / "truth.json", folder / "results.json", expected


def test_real_detections_score_the_published_numbers_and_a_category_those_of_itself(golden):
    truth, results, expected = golden
    records = json.loads(results.read_text())
    whole = evaluate_coco(records, truth)
    assert records == json.loads(results.read_text())  # left alone
    np.testing.assert_allclose(whole["stats"], expected, rtol=0, atol=1e-12)
    report, sizes = whole["per_category"], whole["per_category_per_size"]
    assert len(report) == 80
    known = [ap for ap in report.values() if ap > -1]
    for n, size in enumerate(SIZES, 3):
        mean = np.mean([ap[size] for ap in sizes.values() if ap[size] > -1])
        assert whole["per_size"][size] == whole["stats"][n] == pytest.approx(mean, abs=1e-12)
    assert np.mean(known) == pytest.approx(expected[0], abs=1e-12)
    document = json.loads(truth.read_text())
    document["categories"] = [c for c in document["categories"] if c["id"] == 62]
    document["annotations"] = [a for a in document["annotations"] if a["category_id"] == 62]
    path = truth.with_name("only_62.json")
    path.write_text(json.dumps(document))
    alone = evaluate_coco([r for r in records if r["category_id"] == 62], path)["stats"]
    assert report["category 62"] == pytest.approx(alone[0], abs=1e-12)
    assert list(sizes["category 62"].values()) == pytest.approx(alone[3:6], abs=1e-12)


def test_curves_give_the_ap(golden, tmp_path):
    truth, results, _ = golden
    report = evaluate_coco(results, truth, curves=tmp_path / "new" / "curves.npz")
    curves = load_curves(tmp_path / "new" / "curves.npz")
    assert curves.classes == tuple(report["per_category"])
    assert curves.ious == pytest.approx(np.arange(0.5, 1, 0.05))
    assert curves.arrays["recall"] == pytest.approx(np.linspace(0, 1, 101))
    for name, sizes in report["per_category_per_size"].items():
        for area, ap in ({"all": report["per_category"][name]} | sizes).items():
            found = [curves.curve(name, area, iou) for iou in curves.ious]
            if ap == -1:
                assert not any(len(c[key]) for c in found for key in c)
                continue
            assert np.mean([c["precision"] for c in found]) == pytest.approx(ap)
            for c in found:
                assert len(c["recall"]) == len(c["scores"]) == 101
                assert (np.diff(c["precision"]) <= 0).all() and (np.diff(c["scores"]) <= 0).all()


@pytest.fixture(params=BACKENDS)
def backend(request):
    pytest.importorskip(request.param.replace("-", "_"))
    return request.param


others = pytest.mark.parametrize("backend", BACKENDS[1:], indirect=True)


def assert_equal_to_reference(results, truth, backend, folder):
    """All numbers and arrays of a backend beside pycocotools'; returns the reference's report."""
    files = [folder / f"{name}.npz" for name in ("reference", "curves")]
    expected = evaluate_coco(results, truth, BACKENDS[0], files[0])
    report = evaluate_coco(results, truth, backend, files[1])
    theirs, ours = map(load_curves, files)
    assert np.array_equal(ours.ious, theirs.ious)
    theirs, ours = theirs.arrays, ours.arrays
    assert np.array_equal(ours["scores"], theirs["scores"])
    assert np.array_equal(ours["recall"], theirs["recall"])
    different = ours["precision"] != theirs["precision"]
    if backend == "hotcoco":
        assert not different.any()
    else:  # 1 for 1 / (1 + 2**-52)
        assert (ours["precision"][different] == 1).all()
        assert (theirs["precision"][different] == 1 - 2.0**-52).all()
    # Versions of NumPy add up in different orders.
    near = partial(pytest.approx, rel=0, abs=1e-15)
    assert report["stats"][6:] == near(expected["stats"][6:])
    assert report["stats"] == near(expected["stats"])
    for key in ("per_category", "per_size"):
        assert report[key] == near(expected[key])
    for name, ap in report["per_category_per_size"].items():
        assert ap == near(expected["per_category_per_size"][name])
    if backend == "hotcoco":
        assert report["per_category_interval"] == expected["per_category_interval"]
    return expected


@others
def test_backend_equals_the_reference_on_real_detections(golden, tmp_path, backend, capfd):
    truth, results, expected = golden
    report = assert_equal_to_reference(results, truth, backend, tmp_path)
    np.testing.assert_allclose(report["stats"], expected, rtol=0, atol=1e-12)
    assert capfd.readouterr() == ("", "")  # nothing is printed


def random_set(rng, path):
    """A set with what makes backends differ; writes its annotation file and returns detections.

    Equal scores and overlaps, crowds, equal annotation ids and id 0, ids over 2**53, boxes without
    area and on the limits of the sizes, categories without objects or detections, more than 100
    detections of a category in an image, sets of one image, without objects, without detections.
    """
    count, classes = int(rng.choice([1, 2, 5, 20])), int(rng.choice([1, 3, 8]))
    ids = np.sort(rng.choice(rng.choice([50, 2**60]), count, replace=False))
    categories = np.sort(rng.choice(90, classes, replace=False))
    objects = int(rng.choice([0, 1, count, 6 * count]))
    grid = rng.choice([0.01, 1, 7])

    def rounded(values):
        return np.round(values / grid) * grid

    def random_boxes(n):
        sides = np.exp(rng.uniform(0, 5.2, (n, 2)))
        return rounded(np.hstack([rng.random((n, 2)) * 100, sides]))

    boxes = random_boxes(objects)
    if rng.random() < 0.2:
        boxes[:, 2:] = rng.choice([32, 96], (objects, 2))
    image = rng.integers(0, count, objects)
    label = rng.integers(0, max(1, classes - rng.integers(0, 2)), objects)
    areas = boxes[:, 2:].prod(1) * rng.choice([0.5, 1])
    equal_ids = rng.random() < 0.5
    document = {
        "images": [{"id": id, "width": 640, "height": 480} for id in ids.tolist()],
        "categories": [{"id": id, "name": f"category {id}"} for id in categories.tolist()],
        "annotations": [
            {"id": 0 if equal_ids else n, "image_id": int(ids[image[n]]), "area": areas[n],
             "category_id": int(categories[label[n]]), "bbox": boxes[n].tolist(),
             "iscrowd": int(rng.random() < 0.15)}
            for n in range(objects)]}
    path.write_text(json.dumps(document))

    total = int(rng.choice([0, 1, 5 * count, (250 if count < 20 else 30) * count]))
    found = random_boxes(total)
    found_image, found_label = rng.integers(0, count, total), rng.integers(0, classes, total)
    if objects:
        source, near = rng.integers(0, objects, total), rng.random(total) < 0.7
        moves = rng.normal(0, rng.choice([0, 0.1]), (total, 4)) * np.tile(boxes[source, 2:], 2)
        found[near] = (boxes[source] + rounded(moves))[near]
        found[:, 2:] = found[:, 2:].clip(0)
        found_image[near] = image[source[near]]
        same = near & (rng.random(total) < 0.8)
        found_label[same] = label[source[same]]
    levels = rng.choice([2, 10, 1000])
    scores = rng.random(total) if rng.random() < 0.4 else rng.integers(0, levels, total) / levels
    return COCOResults(ids[found_image], categories[found_label], found, scores)


@pytest.mark.parametrize("sets", [40, pytest.param(120, marks=pytest.mark.slow)])
@others
def test_backend_equals_the_reference_on_random_sets(tmp_path, backend, sets):
    values = set()
    for seed in range(sets):
        results = random_set(np.random.default_rng(seed), tmp_path / "truth.json")
        report = assert_equal_to_reference(results, tmp_path / "truth.json", backend, tmp_path)
        values.update(report["stats"])
    assert {-1, 0} < values and len(values) > 1.6 * sets  # the sets are neither all empty nor alike


@others
def test_backend_uses_the_hundred_best_of_a_category_in_the_order_given(small, tmp_path, backend):
    # 100 wrong ones and a right one of the same score: it is the 101st or the first.
    wrong, right = [result([200, 200, 9, 9])] * 100, [result([0, 0, 40, 40])]
    last = assert_equal_to_reference(wrong + right, small, backend, tmp_path)
    first = assert_equal_to_reference(right + wrong, small, backend, tmp_path)
    assert last["stats"][0] == 0 and first["stats"][0] == pytest.approx(51 / 101)


@pytest.mark.parametrize("name", BACKENDS)
def test_backend_that_is_not_installed_is_named(monkeypatch, name):
    for module in ("hotcoco", "faster_coco_eval", "pycocotools.coco"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"{name} need it installed \(pip install {name}\)"):
        load_backend(name)
    with pytest.raises(ValueError, match="'fastest' is not one of pycocotools, hotcoco, faster"):
        load_backend("fastest")


@pytest.mark.parametrize(("version", "content", "said"), [
    ("1.1.0", {"COCO": SimpleNamespace()}, r"need hotcoco>=1\.2, found 1\.1\.0 .*install -U"),
    ("1.1.0", {"COCO": SimpleNamespace(from_arrays=None)}, None),
    (None, {"COCO": SimpleNamespace(from_arrays=None), "__version__": "1.1.0"}, None)])
def test_version_of_a_backend_is_named_and_an_old_one_refused(monkeypatch, version, content, said):
    def find(name):
        if version is None:  # a module without a package's metadata
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    module = ModuleType("hotcoco")
    vars(module).update(content)
    monkeypatch.setattr(importlib.metadata, "version", find)
    monkeypatch.setitem(sys.modules, "hotcoco", module)
    if said:
        with pytest.raises(UserError, match=said):
            load_backend("hotcoco")
    else:
        assert load_backend("hotcoco")[1] == "hotcoco 1.1.0"


@pytest.mark.parametrize(("error", "said"), [
    ("ImportError('libgomp.so.1: cannot open')", "libgomp.so.1: cannot open"),
    ("ModuleNotFoundError('no numpy.core', name='numpy.core')", "no numpy.core"),
    ("ValueError('numpy.dtype size changed')", "numpy.dtype size changed")])
def test_backend_that_is_broken_says_why(tmp_path, monkeypatch, error, said):
    (tmp_path / "hotcoco.py").write_text(f"raise {error}")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "hotcoco", raising=False)
    with pytest.raises(UserError, match=f"hotcoco .*: {said} .*pip install -U hotcoco"):
        load_backend("hotcoco")


@pytest.fixture
def small(tmp_path):
    """Two dogs in image 1, a crowd of cats in image 2, no oar; annotation ids from 0."""
    boxes = [(1, 3, [0, 0, 40, 40], 0), (1, 3, [50, 0, 40, 40], 0), (2, 7, [0, 0, 40, 40], 1)]
    document = {
        "images": [{"id": id, "width": 100, "height": 100} for id in (2, 1)],
        "categories": [{"id": id, "name": n} for id, n in ((7, "cat"), (3, "dog"), (9, "oar"))],
        "annotations": [
            {"id": id, "image_id": i, "category_id": c, "bbox": b, "area": 1600, "iscrowd": crowd}
            for id, (i, c, b, crowd) in enumerate(boxes)]}
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(document))
    return path


def result(bbox, image_id=1, category_id=3, score=0.9):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def test_scores_by_hand(small):
    # Recall 1/2 reaches 51 of the 101 recall points, 0 to .50, at precision 1.
    report = evaluate_coco([result([0, 0, 40, 40])], small)
    assert report["per_category"] == {"dog": pytest.approx(51 / 101), "cat": -1, "oar": -1}
    ap, ar = 51 / 101, 0.5
    assert report["stats"] == pytest.approx([ap, ap, ap, -1, ap, -1, ar, ar, ar, -1, ar, -1])
    # IoU 30/40 = .75 counts at .50 .55 .60 .65 .70 .75, six of ten.
    report = evaluate_coco([result([0, 0, 30, 40]), result([50, 0, 40, 30])], small)
    assert report["stats"][:3] == pytest.approx([0.6, 1, 1])


def test_no_detections_score_zero_and_minus_one_without_ground_truth(small, backend):
    report = evaluate_coco([], small, backend)
    assert report["stats"] == [0, 0, 0, -1, 0, -1, 0, 0, 0, -1, 0, -1]
    assert report["per_category"] == {"dog": 0, "cat": -1, "oar": -1}
    assert report["per_size"] == {"small": -1, "medium": 0, "large": -1}
    assert report["per_category_per_size"]["cat"] == dict.fromkeys(SIZES, -1)
    assert notes(report) == ["none of the 100 best detections of a class in an image overlaps an"
                             " object of that class by IoU 0.50 or more",
                             "no ground truth (-1) for 2 classes: cat, oar"]


def test_note_on_zero_is_true_of_the_hundred_best_alone(small):
    # The exact one is the 101st of its class in the image, or the 100th.
    wrong, exact = [result([200, 200, 9, 9])] * 100, [result([0, 0, 40, 40], score=0.5)]
    report = evaluate_coco(wrong + exact, small)
    assert report["stats"][0] == report["stats"][8] == 0
    assert notes(report)[0].startswith("none of the 100 best detections of a class in an image")
    report = evaluate_coco(wrong[1:] + exact, small)
    assert report["stats"][6] == 0 < report["stats"][8]
    assert not any("none of" in line for line in notes(report))


def test_annotations_without_boxes_score_minus_one(small, backend):
    small.write_text(json.dumps(json.loads(small.read_text()) | {"annotations": []}))
    for results in ([], [result([0, 0, 40, 40])]):
        assert set(evaluate_coco(results, small, backend)["stats"]) == {-1}


@pytest.mark.parametrize(("results", "message"), [
    ({"a": 1}, "has no list of results"),
    ([5], r"results\[0\] needs a whole number as 'image_id', found None"),
    ([result([0, 0, 4, 4]), result([0, 0, 4])], r"results\[1\].* 4 finite numbers as 'bbox'"),
    ([result([0, 0, 4, 4], score=float("nan"))], ".*a finite number as 'score', found nan"),
    (
        [result([0, 0, 4, 4]), *(result([0, 0, 4, 4], image_id=id) for id in (5, 6))],
        r"results\[1\] has the image_id 5, which .*truth.json does not list, like 2 of 3;"
        " it lists 2, 1 to 2"),
    ([result([0, 0, 4, 4], category_id=1)], r"results\[0\] has the category_id 1, which")])
def test_results_that_cannot_be_scored_are_named(small, tmp_path, results, message, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match=f"results.json: {message}"):
        evaluate_coco(path, small)
    assert main([str(path), str(small)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}") and err.count("\n") == 1


def test_files_that_cannot_be_read_are_named(small, tmp_path):
    (tmp_path / "half.json").write_text('[{"image_id":')
    for results, truth, message in ((tmp_path / "none.json", small, "none.json: cannot read"),
                                    ([], tmp_path / "none.json", "none.json: cannot read"),
                                    (tmp_path / "half.json", small, "half.json: not a JSON file")):
        with pytest.raises(UserError, match=message):
            evaluate_coco(results, truth)


def test_command_line_scores_the_classes_asked_for(small, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([result([0, 0, 40, 40])]))
    out = tmp_path / "new" / "out.json"
    assert main([str(path), str(small), "--classes", "dog,oar", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["images"] == [1, 2]
    assert "1 of 2 images have no detection" in capsys.readouterr().out
    assert report["per_category"] == {"dog": pytest.approx(51 / 101), "oar": -1}
    assert report == evaluate_coco(path, small, classes=("oar", "dog"))
    assert report["stats"] == evaluate_coco(path, small)["stats"]
    assert main([str(path), str(small), "--classes", "cow"]) == 2
    assert "has no category cow; it has dog, cat, oar" in capsys.readouterr().err
    others = [result([0, 0, 40, 40], image_id=2, category_id=7), result([0, 0, 40, 40])]
    path.write_text(json.dumps(others))  # those of classes that are not asked for do not count
    more = evaluate_coco(path, small, classes=("dog",))
    assert more.pop("images") == [2, 2] and more["stats"] == report["stats"]
    path.write_text(json.dumps([result([0, 0, 40, 40], category_id=5)]))
    assert main([str(path), str(small), "--classes", "dog"]) == 2
    assert "results[0] has the category_id 5" in capsys.readouterr().err


def test_images_asked_for_are_scored_as_if_there_were_no_others(golden, tmp_path):
    truth, results, _ = golden
    document, records = json.loads(truth.read_text()), json.loads(results.read_text())
    ids = [image["id"] for image in document["images"][1::3]]
    for key, field in (("images", "id"), ("annotations", "image_id")):
        document[key] = [item for item in document[key] if item[field] in ids]
    (tmp_path / "part.json").write_text(json.dumps(document))
    of_them = [record for record in records if record["image_id"] in ids]
    part = read_annotations(truth).of_images(ids[::-1])
    report = evaluate_coco(of_them, part)
    assert report == evaluate_coco(of_them, tmp_path / "part.json") and report["stats"][0] > 0
    halves = [part.of_images(each) for each in (part.image_ids[:3], part.image_ids[3:])]
    assert report == evaluate_coco(of_them, join(halves))
    expected = read_annotations(tmp_path / "part.json")
    for name in ("image_ids", "file_names", "sizes", "offsets", "boxes", "labels", "areas",
                 "crowds", "annotation_ids", "category_ids", "classes"):  # fmt: skip
        np.testing.assert_array_equal(getattr(part, name), getattr(expected, name))
    with pytest.raises(UserError, match="has the image_id .*, which .* does not list"):
        evaluate_coco(records, part)
    with pytest.raises(UserError, match=r"truth.json: chosen\[1\] has the image_id -5, which"):
        part.of_images([ids[0], -5])


def test_command_line_prints_pycocotools_table_and_writes_json(golden, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results, expected = golden
    assert main([str(results), str(truth), "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    table = printed.splitlines()
    report = json.loads((tmp_path / "out.json").read_text())
    assert report == evaluate_coco(results, truth)
    assert list(report)[:2] == ["stats", "per_category"]
    if importlib.util.find_spec("hotcoco"):
        assert main([str(results), str(truth), "--eval-backend", "hotcoco"]) == 0
        assert capsys.readouterr().out == printed
    for n, bounds in enumerate([report["interval"], report["at_50"]["interval"]]):
        table[n], shown = table[n].removesuffix(")").rsplit(" (", 1)
        assert shown == bootstrap.text(bounds) and shown
    assert table[12:13] == notes(report) and len(table) == 14 + 80 + 1
    name, of_50 = "category 1", report["at_50"]
    assert table[14].split() == " ".join([
        f"{name} {report['per_category'][name]:.4f}",
        bootstrap.text(report["per_category_interval"][name]),
        f"{of_50['per_class'][name]:.4f} {bootstrap.text(of_50['per_class_interval'][name])}",
    ]).split() and len(table[14].split()) == 10  # fmt: skip

    reference = COCO(str(truth))
    evaluation = COCOeval(reference, reference.loadRes(str(results)), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    capsys.readouterr()
    evaluation.summarize()
    theirs = capsys.readouterr().out.splitlines()
    assert [line[:-6] for line in table[:12]] == [line[:-5] for line in theirs]
    assert [float(line[-6:]) for line in table[:12]] == pytest.approx(expected, abs=5e-5)


def test_command_line_refuses_a_bad_call(small, tmp_path, capsys):
    for args in ([str(small)], [str(small), str(small), "--eval-backend", "fastest"]):
        with pytest.raises(SystemExit, match="2"):
            main(args)
    capsys.readouterr()
    assert main(["no results", str(small), "--json", str(tmp_path)]) == 2
    assert f"{tmp_path}: cannot be written" in capsys.readouterr().err
