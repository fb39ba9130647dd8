"""Samples of VOC data sets, and what their evaluation says."""

import numpy as np
import pytest
from coco_files import perfect
from conftest import VOC_IMAGE_SIZE, with_exif, write_annotation

from data.config import VOC_CLASSES
from data.curves import load_curves
from data.skips import SkipKind
from data.voc0712 import VOCDetection
from utils.errors import UserError

WIDTH, HEIGHT = VOC_IMAGE_SIZE


def read(root, name="test"):
    return VOCDetection(root, [(None, name)])


@pytest.fixture
def dataset(make_voc, tmp_path):
    """dataset({image id: objects}): a data set of one image set."""

    def make(samples, **options):
        classes = options.pop("classes", None)
        root = make_voc(tmp_path / "own", {"trainval": samples}, **options)
        return VOCDetection(root, [(None, "trainval")], classes=classes)

    return make


@pytest.fixture
def restated(make_voc, tmp_path):
    """restated(size, objects): a data set of one image whose annotation says that size."""

    def make(size, objects):
        root = make_voc(tmp_path / "own", {"trainval": {"a": objects}})
        write_annotation(root / "Annotations/a.xml", objects, size)
        return VOCDetection(root, [(None, "trainval")])

    return make


def kinds(data):
    return [skip.kind for skip in data.skipped]


def test_devkit_sets_are_joined_in_order_with_the_published_classes(voc_devkit):
    data = VOCDetection(voc_devkit, [("2007", "trainval"), ("2012", "trainval")])
    assert data.ids == ["000001", "000002", "000003", "2008_000001", "2008_000002"]
    assert data.classes == VOC_CLASSES and len(VOC_CLASSES) == 20 and len(list(data)) == 5
    assert data.target(0).tolist() == [[9, 9, 59, 59, 12], [49, 4, 89, 69, 15]]
    assert data.image_path(3) == voc_devkit / "VOC2012/JPEGImages/2008_000001.jpg"
    assert data.skipped == [] and data.report() == []


@pytest.mark.parametrize("year", [None, ""])
def test_labels_follow_the_classes_and_difficult_objects_are_trained_on(voc_folder, year):
    data = VOCDetection(voc_folder, [(year, "test")])
    assert [target[:, 4].tolist() for _, target in data] == [[1], [3, 1], [1, 1], [3]]
    data = VOCDetection(voc_folder, [(year, "test")], classes=["rod", "cell"])
    assert [target[:, 4].tolist() for _, target in data] == [[2], [1, 2], [2, 2], [1]]


def test_difficult_objects_are_trained_on_and_ignored_by_a_score(dataset):
    objects = [
        ("dog", (1, 1, 9, 9), True),
        ("cat", (1, 1, 9, 9), True),  # of no known class
        ("dog", (5, 5, 5, 9), True),  # without area
        ("dog", (20, 20, 40, 40), False), ("dog", (50, 20, 70, 40), True),
    ]
    data = dataset({"a": objects}, classes=["dog"])
    assert data.target(0)[:, 0].tolist() == [0, 19, 49]
    truth = data.truth()
    assert truth.boxes.tolist() == [
        [0, 0, 9, 9], [4, 4, 5, 9], [19, 19, 40, 40], [49, 19, 70, 40],
    ]  # fmt: skip
    assert truth.ignored.tolist() == [True, True, False, True] and truth.rule == "voc"


def test_missing_images_are_refused_all_at_once(voc_folder):
    (voc_folder / "JPEGImages/t2.jpg").unlink()
    (voc_folder / "JPEGImages/t4.jpg").rename(voc_folder / "JPEGImages/t4.txt")
    with pytest.raises(UserError, match=rf"^{voc_folder}: images missing \(2\): .*/t2.jpg .*/t4"):
        read(voc_folder)
    with pytest.raises(UserError, match=rf"the folder above, --root {voc_folder}$"):
        VOCDetection(voc_folder / "Annotations", [(None, "split_train")], faults=[])
    (voc_folder / "JPEGImages").rename(voc_folder / "pictures")
    with pytest.raises(UserError, match=r"images .*missing .4.: .*JPEGImages/t1.jpg .*copy"):
        read(voc_folder)


@pytest.mark.parametrize("suffix", [".JPG", ".jpeg", ".png", ".BMP"])
def test_images_of_other_suffixes_are_found_and_jpeg_is_preferred(dataset, suffix):
    data = dataset({"a.b": [("dog", (1, 1, 9, 9))]}, suffix=suffix)
    assert data.image_path(0).name == f"a.b{suffix}" and data[0][0].shape == (HEIGHT, WIDTH, 3)
    (data.image_path(0).parent / "a.b.jpg").touch()  # JPEG comes first
    assert read(data.root, "trainval").image_path(0).suffix.lower() == ".jpg"


@pytest.mark.parametrize("box", [(30, 30, 30, 30), (30, 30, 50, 30), (40, 20, 30, 50)])
def test_box_without_area_is_dropped_from_training_but_not_from_evaluation(dataset, tmp_path, box):
    data = dataset({"b": [], "a": [("dog", (5, 5, 60, 60)), ("dog", box)]})
    assert data.target(1).tolist() == [[4, 4, 59, 59, 1]]
    [(kind, image, found, detail)] = data.skipped
    assert (kind, image) == (SkipKind.BOX_WITHOUT_AREA, 1)
    assert found == tuple(value - 1 for value in box)
    values = ", ".join(map(str, box))
    path = tmp_path / "own/Annotations/a.xml"
    assert detail.startswith(f'{path}: object 2 ("dog") ({values}) in {WIDTH} x {HEIGHT}')
    assert ("swapped corners?" in detail) == (box[2] < box[0])
    assert len(data.truth().boxes) == 2


@pytest.mark.parametrize(("box", "expected"), [
    ((0, 0, 50, 50), (0, 0, 49, 49)),  # written by a tool that counts from 0
    ((10, 10, WIDTH + 30, HEIGHT + 1), (9, 9, WIDTH - 1, HEIGHT - 1)),
    ((-20, 5, 10.5, 20), (0, 4, 9.5, 19)), ((WIDTH + 5, 5, WIDTH + 20, 20), None),
    ((5, -20, 20, 0), None),
    ((1, 1, WIDTH, HEIGHT), (0, 0, WIDTH - 1, HEIGHT - 1)),
])
def test_box_that_leaves_the_image_is_clipped_or_dropped(dataset, box, expected):
    data = dataset({"a": [("dog", (3, 3, 9, 9)), ("dog", box)]})
    assert data.target(0)[1:, :4].tolist() == ([list(expected)] if expected else [])
    clipped = [] if box == (1, 1, WIDTH, HEIGHT) else [SkipKind.BOX_CLIPPED]
    assert kinds(data) == (clipped if expected else [SkipKind.BOX_OUTSIDE])


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_size_that_is_not_given_is_the_images(restated, size):
    data = restated(size, [("dog", (5, 5, 500, 50))])
    assert data.image_size(0) == VOC_IMAGE_SIZE
    assert data.target(0).tolist() == [[4, 4, WIDTH - 1, 49, 1]]
    data = restated((WIDTH + 1, HEIGHT - 1), [("dog", (5, 5, WIDTH + 1, HEIGHT - 1))])
    assert data[0][0].shape == (HEIGHT, WIDTH, 3) and data.skipped == []  # rounding


def test_size_with_sides_swapped_is_accepted_if_all_boxes_fit_the_image(restated):
    data = restated((HEIGHT, WIDTH), [("dog", (5, 5, WIDTH, 40))])
    assert data.target(0).tolist() == [[4, 4, WIDTH - 1, 39, 1]]
    assert data.image_size(0) == VOC_IMAGE_SIZE and kinds(data) == [SkipKind.SIZE_SWAPPED]
    data[0]
    restated((HEIGHT, WIDTH), [("dog", (5, 5, 40, 40))])[0]
    data = restated((HEIGHT, WIDTH), [("dog", (5, 5, 40, 90))])
    with pytest.raises(UserError, match=r"a\.xml: <size> .* 72 x 96, .* a\.jpg is 96 x 72"):
        data[0]


@pytest.mark.parametrize("size", [(2 * WIDTH, 2 * HEIGHT), (WIDTH, HEIGHT + 2), (40, 60)])
def test_size_of_another_image_is_refused_when_it_is_read(restated, size):
    objects = [("dog", (5, 5, 40, 40))]
    data = restated(size, objects)
    with pytest.raises(UserError, match=rf"<size> .* {size[0]} x {size[1]}, .* 96 x 72; restore"):
        data[0]
    # A box leaves this size, so the image is read at once.
    with pytest.raises(UserError, match=rf"<size> .* 30 x {size[1]}, .* 96 x 72; restore"):
        restated((30, size[1]), objects)


def test_image_turned_by_exif_is_refused_with_the_fix(dataset, restated):
    data = dataset({"a": [("dog", (5, 5, WIDTH, 40))]})
    path = data.image_path(0)
    turned = with_exif(path.read_bytes(), orientation=6)
    path.write_bytes(turned)
    with pytest.raises(UserError, match=r"a\.jpg: .* 72 x 96.* for 96 x 72.*exiftool"):
        data[0]
    # Without a size it is noticed if a box fits only the image as it is stored.
    with pytest.raises(UserError, match=r"a\.jpg: .* 72 x 96.* for 96 x 72.*exiftool"):
        path.write_bytes(turned)
        write_annotation(path.parents[1] / "Annotations/a.xml", [("dog", (5, 5, WIDTH, 40))], None)
        read(path.parents[1], "trainval")
    write_annotation(path.parents[1] / "Annotations/a.xml", [("dog", (5, 5, 40, 90))], None)
    data = read(path.parents[1], "trainval")
    assert data.image_size(0) == (HEIGHT, WIDTH) and data[0][1].shape == (1, 5)


def test_perfect_detections_score_1_and_a_class_without_objects_is_named(voc_folder, tmp_path):
    data = read(voc_folder)
    result = data.evaluate(perfect(data), tmp_path / "out")
    assert result["metric"] == "VOC area AP@.5" and result["iou"] == 0.5
    assert result["per_class"] == {"cell": 1, "platelet": -1, "rod": 1}
    assert result["value"] == result["area"]["mean"] == result["voc07_11point"]["mean"] == 1
    assert result["ground_truths"] == {"cell": 3, "platelet": 0, "rod": 2}  # one cell is difficult
    assert result["detections"] == {"cell": 4, "platelet": 0, "rod": 2}
    (note,) = result["notes"]
    assert "platelet" in note
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"comp4_det_test_{name}.txt" for name in data.classes), result["curves"],
    ]
    assert load_curves(tmp_path / "out/curves.npz").curve("rod")["recall"].tolist() == [0.5, 1]
    for key in ("per_size", "per_class_per_size"):
        assert result[key] == result["area"][key]
    assert result["per_class_per_size"]["platelet"] == {"small": -1, "medium": -1, "large": -1}


@pytest.mark.parametrize(("sets", "metric", "name"), [
    ([("2007", "test")], "VOC07 11-point AP@.5", "test"),
    ([("2012", "trainval")], "VOC area AP@.5", "trainval"),
    ([("2007", "test"), ("2012", "trainval")], "VOC area AP@.5", "2007_test+2012_trainval"),
])
def test_metric_follows_the_year(voc_devkit, tmp_path, sets, metric, name):
    data = VOCDetection(voc_devkit, sets)
    result = data.evaluate(perfect(data), tmp_path / "out")
    assert result["metric"] == metric and result["image_set"] == name
    assert (tmp_path / f"out/comp4_det_{name}_dog.txt").is_file()
    assert result["per_class"]["dog"] == pytest.approx(1)
    main = "voc07_11point" if metric.startswith("VOC07") else "area"
    for key in ("per_class", "per_size", "per_class_per_size"):
        assert result[key] == result[main][key]


def test_same_id_in_two_years_can_be_scored_only_once_one_of_them_is_kept(make_voc, tmp_path):
    for year in ("2007", "2012"):
        make_voc(tmp_path / f"VOC{year}", {"trainval": {"a": [("dog", (1, 1, 9, 9))]}})
    data = VOCDetection(tmp_path, [("2007", "trainval"), ("2012", "trainval")])
    assert len(data) == 2
    for call in (data.check_scorable, lambda: data.evaluate(perfect(data), tmp_path / "out")):
        with pytest.raises(UserError, match=f"{tmp_path}: .* the same id.* one by one"):
            call()
    data.keep_first(1)
    data.check_scorable()
    assert data.evaluate(perfect(data), tmp_path / "out")["area"]["mean"] == pytest.approx(1)


def test_classes_without_ground_truth_in_the_images_kept_are_written_but_not_scored(
    voc_folder, tmp_path
):
    data = read(voc_folder, "trainval")
    data.keep_first(2)
    found = perfect(data)
    found[1] = {"boxes": np.ones((1, 4), np.float32), "scores": [0.5], "labels": [2]}
    result = data.evaluate(found, tmp_path / "out")
    assert result["per_class"] == {"cell": 0.5, "platelet": -1, "rod": 1}
    assert result["value"] == 0.75 and result["notes"][0].endswith("platelet")
    assert (tmp_path / "out/comp4_det_trainval_platelet.txt").read_text().startswith("b2 0.5")


def test_image_of_difficult_objects_alone_is_kept(voc_devkit, dataset, tmp_path):
    data = VOCDetection(voc_devkit, [("2007", "trainval")])
    data.keep_first(2)
    assert data.ids == ["000001", "000002"] and len(data.target(1)) == 1
    result = data.evaluate(perfect(data), tmp_path / "out")
    aps = {name: ap for name, ap in result["per_class"].items() if ap != -1}
    assert aps == {"dog": 1, "person": 1}
    data = dataset({"a": [("dog", (1, 1, 9, 9), True)], "b": []})
    data.keep_first(1)
    result = data.evaluate(perfect(data), tmp_path / "out")
    assert result["value"] == -1 and "dog" in result["notes"][0]
