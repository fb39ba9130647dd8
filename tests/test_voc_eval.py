import errno
import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from coco_files import perfect
from layouts import LAYOUTS
from voc_found import by_class, of_class, score

from data import bootstrap
from data.annotation import Annotation
from data.curves import load_curves
from data.judge import Found
from data.voc0712 import VOCDetection
from data.voc_comp4 import comp4_path, read_comp4, write_comp4
from data.voc_eval import METRICS, average_precision, main, write_voc_curves
from utils.errors import UserError

GOLDENS = Path(__file__).parent / "goldens"


def annotation(names, boxes, difficult):
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    return Annotation(Path("a.xml"), None, tuple(names), boxes, np.array(difficult, bool))


@pytest.mark.parametrize("name", ["BCCD", "VOC2007"])
def test_ap_of_every_class_equals_the_published_codes(name):
    # The file sets equal scores apart, in their published order, which depends on a processor.
    golden = np.load(GOLDENS / f"voc_eval_{name}_test.npz")
    classes, count = golden["classes"].tolist(), int(golden["images"])
    truth, found = golden["ground_truth"], golden["detections"]
    annotations = []
    for image in range(count):
        rows = truth[truth[:, 0] == image]
        names = [classes[label - 1] for label in rows[:, 1]]
        annotations.append(annotation(names, rows[:, 2:6] - 1.0, rows[:, 6]))
    labels = found[:, 1].astype(int)
    detections = Found(found[:, 0].astype(int), found[:, 3:] - (1, 1, 0, 0), labels, found[:, 2])
    result = score(detections, annotations, classes)
    for metric in METRICS:
        assert list(result[metric]["per_class"].values()) == pytest.approx(golden[metric], abs=1e-6)
        assert result[metric]["mean"] == pytest.approx(golden[metric].mean(), abs=1e-6)


LIMITS = {"small": (0, 1024), "medium": (1024, 9216), "large": (9216, 1e10)}


def box_area(box):
    return (box[2] - box[0] + 1) * (box[3] - box[1] + 1)


def slow_average_precisions(detections, annotations, name, low=-np.inf, high=np.inf):
    """One class and area range by the definitions, object by object; -1 without ground truth."""
    taken = set()
    hits, misses = [], []
    for k in np.argsort(-detections.scores, kind="stable"):
        image, box = int(detections.images[k]), detections.boxes[k]
        best, best_object = -1.0, None
        for index, other in enumerate(annotations[image].boxes):
            if annotations[image].names[index] != name:
                continue
            width = min(box[2], other[2]) - max(box[0], other[0]) + 1
            height = min(box[3], other[3]) - max(box[1], other[1]) + 1
            inter = max(width, 0) * max(height, 0)
            union = box_area(box) + box_area(other) - inter
            if inter / union > best:
                best, best_object = inter / union, index
        hit, miss, found = False, best <= 0.5, annotations[image]
        if not miss and not found.difficult[best_object]:
            if low <= box_area(found.boxes[best_object]) <= high:
                hit = (image, best_object) not in taken
                miss = not hit
                taken.add((image, best_object))
        hits.append(hit)
        misses.append(miss and low <= box_area(box) <= high)
    total = sum(
        n == name and not d and low <= box_area(box) <= high
        for a in annotations
        for n, d, box in zip(a.names, a.difficult, a.boxes, strict=True)
    )
    if not total:
        return -1, -1
    points = [(0, 0)]
    for n in range(1, len(hits) + 1):
        hit, miss = sum(hits[:n]), sum(misses[:n])
        points.append((hit / total, hit / (hit + miss) if hit + miss else 0))
    recalls = np.arange(0.0, 1.1, 0.1)
    eleven = sum(max([p for r, p in points if r >= t], default=0) for t in recalls) / 11
    area = sum(
        (points[n][0] - points[n - 1][0]) * max(p for _, p in points[n:])
        for n in range(1, len(points))
    )
    return eleven, area


@pytest.mark.parametrize("seed", range(12))
def test_ap_equals_a_slow_reference(seed, tmp_path):
    rng = np.random.default_rng(seed)
    classes, grid = ("a", "b", "c"), 4 if seed % 2 else 1  # a coarse grid gives equal overlaps
    annotations, rows = [], {name: [] for name in classes}
    for image in range(rng.integers(1, 12)):
        count = rng.integers(0, 6)
        corners = rng.integers(0, 60 // grid, (count, 2)) * grid
        sides = rng.choice([40, 120]) // grid
        boxes = np.hstack([corners, corners + rng.integers(1, sides, (count, 2)) * grid])
        boxes[: rng.integers(0, 2), 2:] = corners[:1] + rng.choice([31, 95])  # a size's limit
        names = rng.choice(classes[:2], count)  # c has no ground truth
        annotations.append(annotation(names, boxes, rng.random(count) < 0.25))
        for name, box in zip(names, boxes, strict=True):
            for _ in range(rng.integers(0, 4)):  # duplicates, near misses, other classes
                moved = box + rng.integers(-2, 3, 4) * grid * rng.integers(0, 2)
                moved[2:] = np.maximum(moved[2:], moved[:2])
                label = name if rng.random() < 0.9 else rng.choice(classes)
                rows[label].append([image, rng.integers(0, 20) / 20, *moved])
        rows[rng.choice(classes)].append([image, rng.random(), 500, 500, 510, 510])
    detections = by_class(*rows.values())
    result = score(detections, annotations, classes)
    for label, name in enumerate(classes, 1):
        own = of_class(detections, label)
        expected = slow_average_precisions(own, annotations, name)
        got = [result[metric]["per_class"][name] for metric in METRICS]
        assert got == pytest.approx(expected, abs=1e-12)
        for size, limits in LIMITS.items():
            expected = slow_average_precisions(own, annotations, name, *limits)
            got = [result[metric]["per_class_per_size"][name][size] for metric in METRICS]
            assert got == pytest.approx(expected, abs=1e-12)
    for metric, size in itertools.product(METRICS, LIMITS):
        known = [ap[size] for ap in result[metric]["per_class_per_size"].values() if ap[size] != -1]
        assert result[metric]["per_size"][size] == (np.mean(known) if known else -1)

    # the curves kept are enough for either metric
    write_voc_curves(tmp_path / "curves.npz", result)
    curves = load_curves(tmp_path / "curves.npz")
    assert curves.classes == classes and curves.areas == ("all", *LIMITS)
    for metric, name in itertools.product(METRICS, classes):
        sizes = result[metric]["per_class_per_size"][name]
        for of_size, ap in ({"all": result[metric]["per_class"][name]} | sizes).items():
            curve = curves.curve(name, of_size)
            assert (np.diff(curve["recall"]) > 0).all() and (np.diff(curve["scores"]) <= 0).all()
            got = average_precision(curve["recall"], curve["precision"], metric)
            assert got == pytest.approx(max(ap, 0), abs=1e-12)


HALF = (0, 0, 9, 9), (0, 0, 9, 19)  # IoU exactly 0.5 in pixel convention


@pytest.mark.parametrize(("rows", "difficult", "recall", "precision"), [
    ([(0, 0.9, *HALF[0])], False, [0], [0]),  # an overlap of 0.5 is not over 0.5
    ([(0, 0.9, 0, 0, 9, 10)], False, [1], [1]),
    ([(0, 0.9, *HALF[1]), (0, 0.8, *HALF[1])], False, [1, 1], [1, 0.5]),  # the second is wrong
    ([(0, 0.8, *HALF[1]), (0, 0.9, 50, 50, 60, 60)], False, [0, 1], [0, 0.5]),
    ([(0, 0.9, *HALF[1]), (0, 0.8, *HALF[1])], True, [0, 0], [0, 0]),  # neither way
    ([(1, 0.9, *HALF[1])], False, [0], [0]),  # no object of the class in that image
])
def test_rule_by_hand(rows, difficult, recall, precision):
    annotations = [annotation(["a"], [HALF[1]], [difficult]), annotation(["b"], [HALF[1]], [False])]
    curve = score(by_class(rows), annotations, ["a"])["curves"]["a"]["all"]
    assert curve["recall"].tolist() == recall and curve["precision"].tolist() == precision


def test_of_equal_scores_the_earlier_detection_comes_first():
    annotations = [annotation(["a", "a"], [(0, 0, 9, 9), (50, 50, 59, 59)], [False, False])]
    # Many of one score: NumPy's default sort does not keep their order.
    wrong, right = [(0, 0.5, 200, 200, 209, 209)] * 40, [(0, 0.5, 0, 0, 9, 9)]
    for rows, place in ((right + wrong, 1), (wrong[:20] + right + wrong[20:], 21)):
        result = score(by_class(rows), annotations, ["a"])
        assert result["area"]["per_class"]["a"] == pytest.approx(0.5 / place)


def test_detection_goes_to_the_object_of_largest_overlap_though_it_is_taken():
    annotations = [annotation(["a", "a"], [(0, 0, 9, 9), (0, 0, 9, 11)], [False, False])]
    rows = (0, 0.9, 0, 0, 9, 9), (0, 0.8, 0, 0, 9, 9)
    curve = score(by_class(rows), annotations, ["a"])["curves"]["a"]["all"]
    assert curve["recall"].tolist() == [0.5, 0.5]


def test_object_without_area_counts_and_is_one_pixel_wide():
    annotations = [annotation(["a", "a"], [(5, 5, 5, 5), (9, 9, 2, 2)], [False, False])]
    result = score(by_class([(0, 0.9, 5, 5, 5, 5)]), annotations, ["a"])
    assert result["ground_truths"] == {"a": 2} and result["area"]["per_class"]["a"] == 0.5


def test_objects_and_wrong_detections_of_another_size_count_neither_way():
    large, small = (0, 0, 99, 99), (200, 200, 209, 209)
    annotations = [annotation(["a", "a"], [large, small], [False, False])]
    rows = [
        (0, 0.9, 300, 300, 309, 309),  # wrong, small
        (0, 0.8, *large),
        (0, 0.7, *large),  # wrong, large: the object is taken
        (0, 0.6, *small),
    ]
    result = score(by_class(rows), annotations, ["a"])
    assert result["area"]["per_size"] == {"small": 0.5, "medium": -1, "large": 1}
    large, small = (result["curves"]["a"][size] for size in ("large", "small"))
    assert large["precision"].tolist() == [0, 1, 0.5, 0.5]
    assert small["precision"].tolist() == [0, 0, 0, 0.5]


def test_eleven_points_and_area_by_hand():
    recall, precision = np.array([0.25, 0.25, 0.5]), np.array([1, 0.5, 2 / 3])
    assert average_precision(recall, precision, "area") == pytest.approx(0.25 + 0.25 * 2 / 3)
    eleven = (3 * 1 + 3 * 2 / 3) / 11  # recalls 0, .1, .2 and .3, .4, .5
    assert average_precision(recall, precision, "voc07_11point") == pytest.approx(eleven)


def test_class_without_detections_and_class_without_ground_truth_are_noted():
    annotations = [annotation(["a"], [(0, 0, 9, 9)], [False])]
    detections = by_class([], [(0, 0.5, 0, 0, 5, 5)], [])
    result = score(detections, annotations, ["a", "b", "c"])
    assert result["notes"] == ["0 detections for class a: its AP is 0",
                               "0 ground truths (-1) for 2 classes: b, c"]
    for metric in METRICS:
        assert result[metric]["mean"] == 0
        assert result[metric]["per_class"] == {"a": 0, "b": -1, "c": -1}
        assert result[metric]["per_size"] == {"small": 0, "medium": -1, "large": -1}


def test_classes_without_ground_truth_count_in_no_mean():
    annotations = [annotation(["b"], [(0, 0, 9, 9)], [False])] * 40
    right = [(n, 0.9, 0, 0, 9, 9) for n in range(40)]
    for metric in METRICS:
        result = score(by_class(right, right, []), annotations, ["a", "b", "c"])[metric]
        assert result["mean"] == 1 and result["interval"] == [1, 1]
        assert result["per_class"] == {"a": -1, "b": 1, "c": -1}
        assert score(by_class(right, []), annotations, ["a", "c"])[metric]["mean"] == -1


def random_detections(rng, count, classes):
    found = []
    for n in rng.integers(0, 6, count):
        corners = rng.uniform(-3, 500, (n, 2))
        boxes = np.hstack([corners, corners + rng.uniform(1, 99, (n, 2))]).astype(np.float32)
        labels = rng.integers(1, classes + 1, n)
        found.append({"boxes": boxes, "scores": rng.random(n, np.float32), "labels": labels})
    return found


def test_line_is_id_score_and_corners_counted_from_1(tmp_path):
    found = {"boxes": np.float32([[0, 9.5, 20, 30]]), "scores": np.float32([0.25]), "labels": [2]}
    none = {"boxes": np.empty((0, 4)), "scores": [], "labels": []}
    write_comp4(tmp_path / "new" / "er", "test", ["cat", "dog"], ["000012", "x"], [found, none])
    text = (tmp_path / "new/er/comp4_det_test_dog.txt").read_text()
    assert text == "000012 0.25 1.000 10.500 21.000 31.000\n"
    assert (tmp_path / "new/er/comp4_det_test_cat.txt").read_text() == ""
    ids = ["my img 1", "x/b1", "two  spaces"]
    write_comp4(tmp_path, "test", ["cat", "dog"], ids, [found] * 3)
    assert read_comp4(tmp_path, "test", ["dog"], ids)[0].images.tolist() == [0, 1, 2]


def test_reading_back_gives_the_same_scores_order_and_boxes(tmp_path):
    rng = np.random.default_rng(0)
    classes, ids = ("cat", "dog", "cow"), [f"{i:06}" for i in range(30)]
    detections = random_detections(rng, len(ids), len(classes))
    detections[3]["scores"][:] = np.nextafter(np.float32(1), np.float32(0))
    write_comp4(tmp_path, "test", classes, ids, detections)
    read, missing = read_comp4(tmp_path, "test", classes, ids)
    assert missing == []
    for label in range(1, len(classes) + 1):
        mines = [found["labels"] == label for found in detections]
        pairs = list(zip(detections, mines, strict=True))
        scores = np.concatenate([found["scores"][mine] for found, mine in pairs])
        boxes = np.concatenate([found["boxes"][mine] for found, mine in pairs])
        own = of_class(read, label)
        assert np.array_equal(own.scores.astype(np.float32), scores)
        assert own.boxes == pytest.approx(boxes.astype(np.float64), abs=5.1e-4)
        images = np.repeat(np.arange(len(ids)), [mine.sum() for mine in mines])
        assert own.images.tolist() == images.tolist()


def test_every_class_name_has_a_file_of_its_own_on_every_disk(tmp_path):
    names = ["cat/dog", "a:b", "blood cell", "Zelle_ä", "zelle_a\u0308", "CON", "..", "\\", "a.",
             "cat", "Cat", "CAT", "猫" * 100, "猫" * 100 + "2"]  # fmt: skip
    assert comp4_path("d", "test", names[0]).name == "comp4_det_test_cat%2Fdog.txt"
    found = {"boxes": np.ones((len(names), 4)), "scores": np.arange(1, len(names) + 1) / 99,
             "labels": np.arange(1, len(names) + 1)}  # fmt: skip
    write_comp4(tmp_path, "test", names, ["x"], [found])
    files = [path.name for path in tmp_path.iterdir()]
    keys = {unicodedata.normalize("NFC", file).casefold() for file in files}
    assert len(keys) == len(files) == len(names)
    assert max(len(file.encode()) for file in files) < 200
    for given in (names, names[::-1], *([name] for name in names)):
        read, missing = read_comp4(tmp_path, "test", given, ["x"])
        assert not missing
        assert read.labels.tolist() == [*range(1, len(given) + 1)]
        assert read.scores == pytest.approx([(names.index(name) + 1) / 99 for name in given])


def test_wrong_detections_and_a_full_disk_leave_the_old_file(tmp_path, monkeypatch):
    found = {"boxes": [[0, 0, 1, 1]], "scores": [0.5], "labels": [1]}
    write_comp4(tmp_path, "test", ["cat"], ["x"], [found])
    before = (tmp_path / "comp4_det_test_cat.txt").read_bytes()
    with pytest.raises(ValueError, match="image x: .*score nan"):
        write_comp4(tmp_path, "test", ["cat"], ["x"], [found | {"scores": [np.nan]}])

    def fsync(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("utils.files.os.fsync", fsync)
    with pytest.raises(UserError, match=r"comp4_det_test_cat\.txt.*No space left.*room"):
        write_comp4(tmp_path, "test", ["cat"], ["x"], [found | {"scores": [0.25]}])
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


@pytest.mark.parametrize(
    "text",
    ["x 0.5 1 2 3 4\nä 1e-3 -1 2.5 +3 4\n", "x 0.5 1 2 3 4\r\nä 1e-3 -1 2.5 +3 4\r\n",
     "\ufeffx 0.5 1 2 3 4\nä 1e-3 -1 2.5 +3 4", "\n x  0.5\t1 2 3 4 \n\n\nä 1e-3 -1 2.5 +3 4\n \n"],
)
def test_line_ends_and_spaces_make_no_difference(tmp_path, text):
    (tmp_path / "comp4_det_test_cat.txt").write_bytes(text.encode())
    read, _ = read_comp4(tmp_path, "test", ["cat"], ["ä", "x"])
    assert read.images.tolist() == [1, 0] and read.scores.tolist() == [0.5, 1e-3]
    assert read.boxes.tolist() == [[0, 1, 3, 4], [-2, 1.5, 3, 4]]


def test_numbers_are_read_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.random((2000, 5)) * 10.0 ** rng.integers(-30, 30, (2000, 5))
    lines = ["x " + " ".join(map(repr, row)) + "\n" for row in values.tolist()]
    (tmp_path / "comp4_det_test_cat.txt").write_text("".join(lines))
    read, _ = read_comp4(tmp_path, "test", ["cat"], ["x"])
    assert np.array_equal(read.scores, values[:, 0])
    assert np.array_equal(read.boxes, values[:, 1:] - (1, 1, 0, 0))


@pytest.mark.parametrize(("text", "message"), [
    ("1 2 3 4 5 6 2\n", r':1: image id "1 2" is not in the image set; give .*--split_by'),
    ("1 0.5 1 2 3 4\n1 0.5 1 2 3\n", ':2: "1 0.5 1 2 3" is not of the form'),
    ("1 0.5 1 2 3 4\n\n1 high 1 2 3 4\n", ':3: "1 high 1 2 3 4" is not of the form'),
    ("1 0.5 1 2 3 4\n1 nan 1 2 3 4\n", ":2: .* is not of the form"),
    ("1\n", ":1: .* is not of the form"),
    ("1 0.5 1 2 3 4\ny 0.5 1 2 3 4\n", r':2: image id "y" is not in the image set'),
])
def test_malformed_line_is_refused_by_file_and_line(tmp_path, text, message):
    path = tmp_path / "comp4_det_test_cat.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=f"{path}{message}"):
        read_comp4(tmp_path, "test", ["cat"], ["1", "2"])


@pytest.fixture
def scored(voc_folder, tmp_path):
    """(data set, folder of comp4 files, result of evaluate) with some detections wrong."""
    data = VOCDetection(voc_folder, [(None, "test")])
    detections = random_detections(np.random.default_rng(1), len(data), 3)
    for index, found in enumerate(detections):
        target = data.target(index)
        found["boxes"] = np.vstack([found["boxes"], target[:, :4] + 2])
        found["scores"] = np.append(found["scores"], np.full(len(target), 0.5, np.float32))
        found["labels"] = np.append(found["labels"], target[:, 4].astype(int))
    return data, tmp_path / "out", data.evaluate(detections, tmp_path / "out")


def test_command_line_gives_the_numbers_of_evaluate_without_images(scored, tmp_path, capsys):
    data, folder, result = scored
    for path in (data.root / "JPEGImages").iterdir():
        path.unlink()
    (data.root / "JPEGImages").rmdir()
    out = tmp_path / "new/ap.json"
    assert main([str(folder), "--root", str(data.root), "--set", "test", "--json", str(out)]) == 0
    written = json.loads(out.read_text())
    assert list(written) == ["voc07_11point", "area"]
    for metric in METRICS:
        assert written[metric] == result[metric]["per_class"]
    text = capsys.readouterr().out
    assert "0 ground truths (-1) for 1 classes: platelet" in text
    assert all(metric in text for metric in METRICS.values())
    row = next(line for line in text.splitlines() if line.startswith("rod"))
    cells = (f"{result[m]['per_class']['rod']:.4f}  {text_of(result[m], 'rod')}" for m in METRICS)
    assert row.split()[3:] == " ".join(cells).split()
    mean, *sizes = text.splitlines()[-4:]
    cells = (f"{result[m]['mean']:.4f} {bootstrap.text(result[m]['interval'])}" for m in METRICS)
    assert mean.split() == ["mean", *" ".join(cells).split()]
    for line, size in zip(sizes, LIMITS, strict=True):
        values = [f"{result[metric]['per_size'][size]:.4f}" for metric in METRICS]
        assert line.split() == ["mean,", size, *values]


def test_command_line_divides_the_images_as_the_test_did(tmp_path, capsys):
    LAYOUTS["labelimg"].write(tmp_path / "data")
    data = VOCDetection(tmp_path / "data", [(None, "split_val")], val_share=0.1)
    data.evaluate(perfect(data), tmp_path / "out")
    words = [str(tmp_path / "out"), "--root", str(data.root), "--set", "split_val"]
    assert main([*words, "--val_share", "0.1", "--json", str(tmp_path / "ap.json")]) == 0
    written = json.loads((tmp_path / "ap.json").read_text())
    assert written["area"] == {"cell": -1, "red box": 1, "zebra": 1}  # without a cell
    assert "no detection;" not in capsys.readouterr().out
    assert main(words) == 0
    assert "1 of 3 images have no detection" in capsys.readouterr().out


def text_of(scores, name):
    return bootstrap.text(scores["per_class_interval"][name])


def test_classes_can_be_given_and_one_without_a_file_has_no_detections(scored, tmp_path, capsys):
    data, folder, result = scored
    out = tmp_path / "ap.json"
    args = [str(folder), "--root", str(data.root), "--set", "test", "--json", str(out)]
    assert main([*args, "--classes", "rod"]) == 0
    assert json.loads(out.read_text())["area"] == {"rod": result["area"]["per_class"]["rod"]}
    assert "object of an unknown class, dropped: 4, e.g. " in capsys.readouterr().out
    (folder / "comp4_det_test_rod.txt").unlink()
    assert main(args) == 0
    assert "comp4_det_test_rod.txt: no such file, rod has no detections" in capsys.readouterr().out
    assert json.loads(out.read_text())["area"]["rod"] == 0


@pytest.mark.parametrize("words, sets", [
    (["test"], [("2007", "test")]), (["test", "--year", "2007"], [("2007", "test")]),
    (["2007_test"], [("2007", "test")]),
    (["test,trainval", "--year", "2007"], [("2007", "test"), ("2007", "trainval")]),
    (["2007_test,2012_trainval"], [("2007", "test"), ("2012", "trainval")]),
    (["2007_test+2012_trainval"], [("2007", "test"), ("2012", "trainval")])])
def test_sets_of_a_devkit_are_named_as_in_a_test(voc_devkit, tmp_path, capsys, words, sets):
    data = VOCDetection(voc_devkit, sets)
    data.evaluate(perfect(data), tmp_path / "out")
    assert main([str(tmp_path / "out"), "--root", str(voc_devkit), "--set", *words]) == 0
    said = capsys.readouterr().out
    assert said.startswith(", ".join(map("_".join, sets)) + f" of {voc_devkit}: {len(data)} images")


def test_bad_input_gives_one_sentence_and_exit_code_2(scored, voc_devkit, tmp_path, capsys):
    data, folder, _ = scored
    bare, devkit = ["--root", str(data.root)], ["--root", str(voc_devkit)]
    blocked = tmp_path / "file"
    blocked.touch()
    for args, message in (
        ([str(folder), *devkit, "--set", "trainval"], "2007 and 2012; choose with --year"),
        ([str(folder), *bare, "--set", "val"], "image sets: test, trainval"),
        ([str(folder), *devkit, "--set", "2008_test"], 'no image set "2008_test"'),
        ([str(folder), *bare, "--set", "trainval"], "no detection file of the classes"),
        ([str(tmp_path / "none"), *bare, "--set", "test"], "existing: none"),
        ([str(folder), "--root", str(blocked), "--set", "test"], "no such data set folder"),
        ([str(folder), "--root", "~no such user/a", "--set", "test"], "no such data set folder"),
        # before anything is read
        ([str(folder), "--root", "no", "--set", "test", "--json", str(blocked / "a")], "cannot be"),
    ):
        assert main(args) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1 and not captured.out
