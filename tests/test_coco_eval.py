"""COCO scores: the published numbers on real detections, and hand-computed small cases."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.coco_eval import evaluate_coco, main, notes
from utils.errors import UserError

GOLDENS = Path(__file__).parent / "goldens"


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """(annotation file, results file, the twelve expected numbers) of 79 pictures of val2017."""
    figures = np.load(GOLDENS / "coco_eval_val2017.npz")
    ids, sizes, categories, truth_ids = (
        figures[key].tolist() for key in ("image_id", "image_size", "category_id", "truth_id")
    )

    def records(kind, fields, **more):
        columns = [figures[f"{kind}_{field}"].tolist() for field in fields]
        return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]

    truth = records("truth", ("image_id", "category_id", "bbox", "area", "iscrowd"))
    document = {
        "images": [
            {"id": id, "width": w, "height": h} for id, (w, h) in zip(ids, sizes, strict=True)
        ],
        "categories": [{"id": id, "name": f"category {id}"} for id in categories],
        "annotations": [{"id": id} | t for id, t in zip(truth_ids, truth, strict=True)],
    }
    folder = tmp_path_factory.mktemp("golden")
    (folder / "truth.json").write_text(json.dumps(document))
    results = records("result", ("image_id", "category_id", "bbox", "score"))
    (folder / "results.json").write_text(json.dumps(results))
    expected = json.loads((GOLDENS / "coco_eval_val2017_stats.json").read_text())
    return folder / "truth.json", folder / "results.json", expected


def test_twelve_numbers_of_real_detections(golden):
    truth, results, expected = golden
    report = evaluate_coco(results, truth)
    np.testing.assert_allclose(report["stats"], expected, rtol=0, atol=1e-12)
    assert evaluate_coco(json.loads(results.read_text()), truth) == report


def test_ap_per_category_is_that_of_the_category_alone(golden):
    truth, results, _ = golden
    report = evaluate_coco(results, truth)["per_category"]
    assert len(report) == 80
    known = [ap for ap in report.values() if ap > -1]
    assert np.mean(known) == pytest.approx(evaluate_coco(results, truth)["stats"][0], abs=1e-12)
    document = json.loads(truth.read_text())
    for id in (1, 62):
        alone = {
            "images": document["images"],
            "categories": [c for c in document["categories"] if c["id"] == id],
            "annotations": [a for a in document["annotations"] if a["category_id"] == id],
        }
        path = truth.with_name(f"only_{id}.json")
        path.write_text(json.dumps(alone))
        chosen = [r for r in json.loads(results.read_text()) if r["category_id"] == id]
        alone = evaluate_coco(chosen, path)["stats"][0]
        assert report[f"category {id}"] == pytest.approx(alone, abs=1e-12)


def test_real_ground_truth_as_detections_scores_one(golden):
    truth, _, _ = golden
    boxes = json.loads(truth.read_text())["annotations"]
    fields = ("image_id", "category_id", "bbox")
    results = [{f: b[f] for f in fields} | {"score": 1.0} for b in boxes if not b["iscrowd"]]
    report = evaluate_coco(results, truth)
    assert report["stats"][:6] == pytest.approx([1] * 6)
    assert sum(ap == -1 for ap in report["per_category"].values()) == 2


def test_nothing_is_printed_and_the_given_list_is_left_alone(golden, capsys):
    truth, results, _ = golden
    records = json.loads(results.read_text())
    evaluate_coco(records, truth)
    assert records == json.loads(results.read_text())
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def small(tmp_path):
    """Two dogs in picture 1, a crowd of cats in picture 2, no oar; annotation ids from 0."""
    boxes = [(1, 3, [0, 0, 40, 40], 0), (1, 3, [50, 0, 40, 40], 0), (2, 7, [0, 0, 40, 40], 1)]
    document = {
        "images": [{"id": id, "width": 100, "height": 100} for id in (2, 1)],
        "categories": [{"id": id, "name": n} for id, n in ((7, "cat"), (3, "dog"), (9, "oar"))],
        "annotations": [
            {"id": id, "image_id": i, "category_id": c, "bbox": b, "area": 1600, "iscrowd": crowd}
            for id, (i, c, b, crowd) in enumerate(boxes)
        ],
    }
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(document))
    return path


def result(bbox, image_id=1, category_id=3, score=0.9):
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "score": score}


def test_one_of_two_objects_found_by_hand(small):
    # Recall 1/2 reaches 51 of the 101 recall points, 0 to .50, at precision 1.
    report = evaluate_coco([result([0, 0, 40, 40])], small)
    assert report["per_category"] == {"dog": pytest.approx(51 / 101), "cat": -1, "oar": -1}
    ap, ar = 51 / 101, 0.5
    expected = [ap, ap, ap, -1, ap, -1, ar, ar, ar, -1, ar, -1]
    assert report["stats"] == pytest.approx(expected)


def test_overlap_decides_at_which_iou_a_detection_counts(small):
    # IoU 30/40 = .75 counts at .50 .55 .60 .65 .70 .75, six of ten.
    report = evaluate_coco([result([0, 0, 30, 40]), result([50, 0, 40, 30])], small)
    assert report["stats"][:3] == pytest.approx([0.6, 1, 1])


def test_no_detections_score_zero_and_minus_one_without_ground_truth(small, tmp_path):
    report = evaluate_coco([], small)
    assert report["stats"] == [0, 0, 0, -1, 0, -1, 0, 0, 0, -1, 0, -1]
    assert report["per_category"] == {"dog": 0, "cat": -1, "oar": -1}
    assert notes(report) == [
        "no detection overlaps an object of its class by IoU 0.50 or more",
        "no ground truth (-1) for 2 classes: cat, oar",
    ]
    (tmp_path / "empty.json").write_text("[]")
    assert evaluate_coco(tmp_path / "empty.json", small) == report


def test_annotations_without_boxes_score_minus_one(small):
    document = json.loads(small.read_text()) | {"annotations": []}
    small.write_text(json.dumps(document))
    for results in ([], [result([0, 0, 40, 40])]):
        assert set(evaluate_coco(results, small)["stats"]) == {-1}


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({"a": 1}, "has no list of results"),
        ([5], r"results\[0\] needs a whole number as 'image_id', found None"),
        ([result([0, 0, 4, 4]), result([0, 0, 4])], r"results\[1\].* 4 finite numbers as 'bbox'"),
        ([result([0, 0, 4, 4], score=float("nan"))], ".*a finite number as 'score', found nan"),
        ([result([0, 0, 4, 4], score=None)], ".*a finite number as 'score', found None"),
        (
            [result([0, 0, 4, 4]), *(result([0, 0, 4, 4], image_id=id) for id in (5, 6))],
            r"results\[1\] has the image_id 5, which .*truth.json does not list, like 2 of 3;"
            " it lists 2, 1 to 2",
        ),
        ([result([0, 0, 4, 4], category_id=1)], r"results\[0\] has the category_id 1, which"),
    ],
)
def test_results_that_cannot_be_scored_are_named(small, tmp_path, results, message, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    with pytest.raises(UserError, match=f"results.json: {message}"):
        evaluate_coco(path, small)
    assert main([str(path), str(small)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {path}") and err.count("\n") == 1


def test_files_that_cannot_be_read_are_named(small, tmp_path):
    with pytest.raises(UserError, match="none.json: cannot be read"):
        evaluate_coco(tmp_path / "none.json", small)
    with pytest.raises(UserError, match="none.json: cannot be read"):
        evaluate_coco([], tmp_path / "none.json")
    (tmp_path / "half.json").write_text('[{"image_id":')
    with pytest.raises(UserError, match="half.json: not a JSON file"):
        evaluate_coco(tmp_path / "half.json", small)


def test_test_set_has_nothing_to_score_against(small):
    document = json.loads(small.read_text())
    del document["annotations"]
    small.write_text(json.dumps(document))
    with pytest.raises(UserError, match="truth.json: has no list of annotations"):
        evaluate_coco([], small)


def test_command_line_prints_pycocotools_table_and_writes_json(golden, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, results, expected = golden
    assert main([str(results), str(truth), "--json", str(tmp_path / "out.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    report = json.loads((tmp_path / "out.json").read_text())
    assert report == evaluate_coco(results, truth) and list(report) == ["stats", "per_category"]
    assert table[12:] == notes(report) and len(table) == 13

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
    with pytest.raises(SystemExit) as error:
        main([str(small)])
    assert error.value.code == 2
    (tmp_path / "empty.json").write_text("[]")
    for target in (tmp_path / "empty.json" / "out.json", tmp_path):
        assert main(["no results", str(small), "--json", str(target)]) == 2
        assert f"{target}: cannot be written" in capsys.readouterr().err
    target = tmp_path / "new" / "out.json"
    assert main([str(tmp_path / "empty.json"), str(small), "--json", str(target)]) == 0
    assert json.loads(target.read_text()) == evaluate_coco([], small)
