"""--test on small data sets, end to end, and detectors of other classes than the data's."""

import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from layouts import ALL, LAYOUTS
from program import locked_elsewhere
from test_layouts import slow_split

import engine.evaluate
import engine.resolve
import engine.testing
import train_test
from data import voc_eval
from data.config import COCO_300, COCO_CLASSES
from inference.predictor import Predictor
from layers import PriorBox
from models import build_net
from train_test import main
from utils.checkpoint import load_checkpoint, save_checkpoint, sha256_of
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny")


def weights(path):
    return load_checkpoint(path)["model"]


def test_a_test_takes_all_from_the_checkpoint_and_leaves_results(call, trained):
    assert call("--test", trained) == 0
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    results = json.loads((folder / "results.json").read_text())
    assert results["checkpoint"] == {"file": trained.name, "sha256": sha256_of(trained)}
    assert results["thresholds"] == {"score": 0.03, "nms": 0.45, "per_class": 50, "per_image": 300}
    assert results["metric"] == "VOC area AP@.5"
    scores = [ap for ap in results["per_class"].values() if ap != -1]
    assert len(scores) == 2 and results["value"] == pytest.approx(np.mean(scores))
    assert {p.name for p in folder.iterdir()} >= {
        "comp4_det_test_cell.txt", "comp4_det_test_rod.txt", "comp4_det_test_platelet.txt",
        "detections.npz",
    }  # fmt: skip


@pytest.mark.parametrize("views", [(), ("--flip",)])
def test_results_name_the_bytes_that_were_tested(views, call, trained, monkeypatch):
    before, open_dataset = sha256_of(trained), engine.testing.open_dataset

    def replaced(*args):  # as a training replaces last.pth
        dataset = open_dataset(*args)
        save_checkpoint(trained, load_checkpoint(trained) | {"step": 99})
        return dataset

    monkeypatch.setattr(engine.testing, "open_dataset", replaced)
    assert call("--test", trained, *views) == 0
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    tested = json.loads((folder / "results.json").read_text())["checkpoint"]["sha256"]
    # With views the predictor reads the file anew, after the data.
    assert (tested == before) == (not views) and (tested == sha256_of(trained)) == bool(views)


def test_scoring_the_files_by_themselves_gives_the_same_ap(call, trained, voc_folder, tmp_path):
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    folder.mkdir(parents=True)
    (folder / "comp4_det_test_zebra.txt").touch()  # of an earlier test with other classes
    assert call("--test", trained) == 0
    assert not (folder / "comp4_det_test_zebra.txt").exists()
    out = tmp_path / "ap.json"
    arguments = [str(folder), "--root", str(voc_folder), "--set", "test", "--json", str(out)]
    assert voc_eval.main(arguments) == 0
    results = json.loads((folder / "results.json").read_text())
    assert json.loads(out.read_text())["area"] == results["per_class"]


def test_an_earlier_test_is_kept_until_the_new_detections_are(call, trained, monkeypatch):
    assert call("--test", trained) == 0
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path, *_):
        raise UserError(f"{path}: cannot be written")

    monkeypatch.setattr(engine.evaluate, "save_detections", full)
    assert call("--test", trained, "--max_detections", 7) == 2
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_retest_scores_the_kept_detections_without_the_network(call, trained, monkeypatch, capsys):
    assert call("--test", trained, "--retest") == 2
    assert "no detections to score again" in capsys.readouterr().err
    assert call("--test", trained) == 0
    path = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test" / "results.json"
    first = json.loads(path.read_text())
    monkeypatch.setattr(train_test, "detect_set", None)
    assert call("--test", trained, "--retest") == 0
    assert json.loads(path.read_text()) == first


def test_retest_refuses_detections_that_do_not_say_their_limits(call, trained, capsys):
    assert call("--test", trained) == 0
    path = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test" / "detections.npz"
    arrays = dict(np.load(path))
    origin = json.loads(str(arrays["made_by"]))
    for wrong in ({}, {"score": "a"}, {"score": None}, {"per_class": 1.5}):
        limits = {**origin["thresholds"], **wrong} if wrong else 5
        made_by = np.array(json.dumps({**origin, "thresholds": limits}))
        np.savez(path, **arrays | {"made_by": made_by})
        assert call("--test", trained, "--retest") == 2
        error = capsys.readouterr().err
        assert str(path) in error and "without --retest" in error and error.count("\n") == 1


def test_the_options_of_detection_are_followed_and_recorded(call, trained, monkeypatch, capsys):
    made = []

    class Recording(train_test.Detect):
        def __init__(self, variance, **options):
            made.append(options)
            super().__init__(variance=variance, **options)

    monkeypatch.setattr(train_test, "Detect", Recording)
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"

    def results(*options):
        assert call("--test", trained, *options) == 0
        return json.loads((folder / "results.json").read_text())

    published = results()
    assert made.pop() == {
        "conf_thresh": 0.03, "nms_thresh": 0.45, "per_class": 50, "top_k": 300, "nms": "hard",
        "class_agnostic": False, "background_shortcut": False,
    }  # fmt: skip
    options = ["--score_threshold", 0, "--nms", "soft-gaussian", "--class_agnostic"]
    options += ["--max_detections", 7, "--max_per_class", 60, "--background_shortcut"]
    other = results(*options)
    assert made.pop() == {
        "conf_thresh": 0, "nms_thresh": 0.45, "per_class": 60, "top_k": 7, "nms": "soft-gaussian",
        "class_agnostic": True, "background_shortcut": True,
    }  # fmt: skip
    assert other["thresholds"] == {"score": 0, "nms": 0.45, "per_class": 60, "per_image": 7}
    assert other["suppression"] == {
        "nms": "soft-gaussian", "class_agnostic": True, "background_shortcut": True,
    }  # fmt: skip
    assert other["detection_count"] == 7 * other["images"] != published["detection_count"]


@pytest.mark.parametrize("option, told", [
    (("--score_threshold", 0.4), r"was made with thresholds: score 0\.03, not 0\.4;"),
    (("--max_detections", 8), r"was made with thresholds: per_image 300, not 8;"),
    (("--nms", "soft"), r"was made with suppression: nms 'hard', not 'soft';"),
    (("--class_agnostic", "true"), r"with suppression: class_agnostic False, not True;"),
    (("--background_shortcut", "true"), r"background_shortcut False, not True;"),
])
def test_retest_refuses_detections_of_other_options(call, trained, capsys, option, told):
    assert call("--test", trained, *option) == 0
    assert call("--test", trained, *option, "--retest") == 0
    assert call("--test", trained, "--retest") == 0
    assert call("--test", trained) == 0
    assert call("--test", trained, *option, "--retest") == 2
    assert re.search(told, capsys.readouterr().err)


def test_a_test_that_ends_early_leaves_no_scores_of_other_detections(call, trained, monkeypatch):
    assert call("--test", trained) == 0
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    assert {"results.json", "curves.npz"} <= {path.name for path in folder.iterdir()}

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.evaluate, "score", interrupted)
    assert call("--test", trained, "--nms", "soft") == 130
    assert not {"results.json", "curves.npz"} & {path.name for path in folder.iterdir()}


def test_weights_that_diverged_are_told(call, trained, capsys):
    saved = torch.load(trained, weights_only=True)
    saved["model"]["conf.0.bias"][0] = torch.nan
    torch.save(saved, trained)
    assert call("--test", trained) == 2
    error = capsys.readouterr().err
    assert str(trained) in error and "not finite: conf.0.bias" in error and "earlier" in error


def test_an_overflow_of_fp16_is_told_with_the_precisions_that_hold_more(
    call, trained, capsys, monkeypatch
):
    def overflow(net, detect, priors, loader, amp, advance):
        raise FloatingPointError("conf contains NaN or +infinity")

    monkeypatch.setattr(engine.evaluate, "detect_all", overflow)
    monkeypatch.setattr(engine.resolve, "choose_device", lambda *_: torch.device("cpu"))
    assert call("--test", trained, "--amp", "fp16") == 2
    error = capsys.readouterr().err
    assert "--amp fp16 ends at 65504" in error and "--amp bf16" in error


def test_retest_refuses_detections_of_other_weights(call, trained, capsys):
    assert call("--test", trained) == 0
    saved = torch.load(trained, weights_only=True)
    saved["model"]["loc.0.bias"] += 1
    torch.save(saved, trained)
    assert call("--test", trained, "--retest") == 2
    assert "sha256" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "words"), [
    (("-v", "SSD_vgg"), ("SSD_vgg", "tiny")), (("-s", "512"), ("512", "300")),
    (("-d", "COCO"),
     ("COCO", "instances_val2017.json")),  # data to test on, which are not there
    (("--classes", "a,b"), ("not learnt a, b", "cell, platelet, rod")),
])
def test_option_that_contradicts_the_checkpoint_is_refused_with_both_values(
    call, trained, options, words, capsys
):
    assert call("--test", trained, *options) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def published(tmp_path, num_classes, prefix="module."):
    net = build_net("tiny", 300, num_classes)
    path = tmp_path / "published.pth"
    torch.save({prefix + k: t for k, t in net.state_dict().items()}, path)
    return path


def test_a_published_file_is_tested_on_the_data_of_its_classes(call, tmp_path, voc_devkit, capsys):
    path = published(tmp_path, 21)
    assert call("--test", path, "--root", voc_devkit) == 0
    found = list((call.folder / "published").glob("ss_predict/*/2007_test/results.json"))
    assert len(json.loads(found[0].read_text())["per_class"]) == 20
    assert call("--test", published(tmp_path, 81), "--root", tmp_path / "nothing") == 2
    assert "instances_val2017.json" in capsys.readouterr().err


def test_a_published_file_with_own_classes_asks_for_their_names(call, tmp_path, voc_folder, capsys):
    path = published(tmp_path, 4)
    assert call("--test", path, "--root", voc_folder) == 2
    assert "3 classes and no names" in capsys.readouterr().err
    names = ("--classes", "cell,platelet,rod")
    assert call("--test", path, "--root", voc_folder, "-d", "VOC", *names) == 0
    assert call("--test", path, "--root", voc_folder, "-d", "VOC", "--classes", "cell,rod") == 2
    assert "3 classes" in capsys.readouterr().err


def test_precision_of_the_training_machine_is_not_that_of_the_test(call, trained):
    saved = torch.load(trained, weights_only=True)
    saved["config"] |= {"amp": "fp16", "ngpu": 4}
    torch.save(saved, trained)
    assert call("--test", trained) == 0


def test_results_lie_in_the_run_of_their_checkpoint_wherever_that_is(call, trained, tmp_path):
    moved = tmp_path / "elsewhere" / "run"
    shutil.copytree(trained.parent, moved)
    assert main(["--test", str(moved / trained.name), "--num_workers", "0"]) == 0
    assert (moved / "ss_predict" / trained.stem / "test" / "results.json").is_file()
    for run in (trained.parent, moved):
        assert call("--test", run / trained.name, "--save_folder", tmp_path / "out") == 0
    found = {path.parts[-5] for path in (tmp_path / "out/tiny_300").rglob("results.json")}
    assert found == {trained.parent.name, "run"}


def test_moved_data_are_divided_and_tested_as_before(call, tmp_path):
    LAYOUTS["labelimg"].write(tmp_path / "data")
    rule = ("--val_share", 0.4, "--split_by", "[a-z]+")
    assert call("--max_iters", 1, "--date", "a", *rule, root=tmp_path / "data") == 0
    path, counts = call.folder / "a" / "last.pth", []
    for name in ("data", "moved"):
        if name == "moved":
            (tmp_path / "data").rename(tmp_path / "moved")
        assert call("--test", path, "--root", tmp_path / name) == 0
        results = json.loads((path.parent / "ss_predict/last/split_val/results.json").read_text())
        counts.append(results["images"])
    assert counts == [len(slow_split(ALL, 0.4, "[a-z]+")[1])] * 2


def test_a_test_that_cannot_be_kept_detects_nothing(call, trained, monkeypatch, capsys):
    (trained.parent / "ss_predict").write_text("in the way")
    monkeypatch.setattr(train_test, "detect_set", None)
    assert call("--test", trained) == 2
    assert "ss_predict" in capsys.readouterr().err


def test_a_folder_that_another_process_tests_into_is_left_alone(call, trained, capsys):
    assert call("--test", trained) == 0
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with locked_elsewhere(folder / ".lock"):
        for options in (("--max_detections", 7), ("--retest",)):
            assert call("--test", trained, *options) == 2
            error = capsys.readouterr().err
            assert str(folder) in error and "another process" in error and "--date" in error
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert call("--test", trained, "--max_detections", 7) == 0


def test_coco_trains_and_is_scored(call, coco_folder, monkeypatch, capsys):
    pytest.importorskip("hotcoco")
    common = ["--save_folder", str(call.folder.parent), "--device", "cpu", "--num_workers", "0"]
    options = ["-d", "COCO", "-v", "tiny", "-s", "300", "--root", str(coco_folder), "-b", "2",
               "-max", "1", "--date", "coco", "--eval-backend", "hotcoco", *common]  # fmt: skip
    assert main(options) == 0
    run = call.folder / "coco"
    results = json.loads((run / "ss_predict" / "final" / "2017_val" / "results.json").read_text())
    assert len(results["stats"]) == 12
    assert results["backend"].startswith("hotcoco 1.")

    checkpoint = run / "Final_tiny_COCO.pth"
    path = run / "ss_predict" / checkpoint.stem / "2017_val" / "results.json"
    found = []
    for backend in ((), ("--eval-backend", "hotcoco"), ("--eval-backend", "faster-coco-eval")):
        assert main(["--test", str(checkpoint), *common, *backend]) == 0
        found.append(json.loads(path.read_text()))
    assert [report["backend"].split()[0] for report in found] == [
        "pycocotools", "hotcoco", "faster-coco-eval",
    ]  # fmt: skip
    assert found[0]["stats"] == found[1]["stats"] == pytest.approx(found[2]["stats"], abs=1e-14)

    monkeypatch.setitem(sys.modules, "hotcoco", None)
    monkeypatch.setattr(train_test, "detect_set", None)
    assert main(["--test", str(checkpoint), *common, "--eval-backend", "hotcoco"]) == 2
    assert "pip install" in capsys.readouterr().err


def test_tiles_and_mirrored_images_are_detected_in_as_by_the_predictor(call, trained, voc_folder):
    views = ("--tiles", 60, "--flip")
    assert call("--test", trained, *views) == 0
    folder = call.folder / "a" / "ss_predict" / "Final_tiny_VOC" / "test"
    results = json.loads((folder / "results.json").read_text())
    assert results["views"] == {"tiles": 60, "overlap": 0.2, "flip": True}
    predictor = Predictor(trained, tiles=60, flip=True, device="cpu")
    found = predictor(sorted((voc_folder / "JPEGImages").glob("t*.jpg")))
    assert results["detection_count"] == sum(len(each["scores"]) for each in found) > 0
    assert call("--test", trained, "--retest", *views) == 0
    assert call("--test", trained, "--retest", "--tiles", 50) == 2
    assert call("--test", trained, "--tiles", 50, "--overlap", 1) == 2


# ---------------------------------------------------------------- transfer


@pytest.fixture
def coco_file(tmp_path):
    """A published file of 81 classes, in which row k of a box's conf weights is filled with k."""
    net = build_net("tiny", 300, 81)
    for layer in net.conf:
        rows = torch.arange(81.0).repeat(layer.out_channels // 81)
        with torch.no_grad():
            layer.weight[:] = rows[:, None, None, None]
            layer.bias[:] = -rows
    torch.save(net.state_dict(), tmp_path / "coco.pth")
    return tmp_path / "coco.pth"


VOC_ROWS = [0, 5, 2, 15, 9, 40, 6, 3, 16, 57, 20, 61, 17, 18, 4, 1, 59, 19, 58, 7, 63]


@pytest.fixture
def detecting(monkeypatch):
    """Records networks and prior boxes that are to detect; nothing is detected."""
    seen = []

    def detect(net, _, priors, dataset, *__):
        seen.append((net, priors))
        none = {"boxes": np.zeros((0, 4)), "scores": np.zeros(0), "labels": np.zeros(0, np.int64)}
        return [none] * len(dataset)

    monkeypatch.setattr(train_test, "detect_set", detect)
    return seen


def test_a_coco_detector_is_tested_on_voc_by_its_21_rows(call, coco_file, voc_devkit, detecting):
    assert call("--test", coco_file, "-d", "VOC", "--root", voc_devkit) == 0
    ((net, priors),) = detecting
    for layer in net.conf:
        rows = torch.tensor(VOC_ROWS).repeat(layer.out_channels // 21)
        assert torch.equal(layer.weight[:, 0, 0, 0], rows.float())
        assert torch.equal(layer.bias, -rows.float())
    assert torch.equal(priors, PriorBox(COCO_300)())


def test_a_coco_detector_is_tuned_on_voc_and_keeps_its_boxes(
    call, coco_file, voc_devkit, detecting, capsys
):
    options = ("--root", voc_devkit, "--resume_net", coco_file, "--lr", 0, "--date", "tuned")
    assert call(*options, "-d", "VOC", "-max", 1, "--max_iters", 1, "--test_frequency", 0) == 0
    assert "20 of 20 classes by name" in capsys.readouterr().out
    checkpoint = call.folder / "tuned" / "last.pth"
    assert load_checkpoint(checkpoint)["config"]["priors"] == "COCO"
    assert call("--test", checkpoint) == 0
    ((net, priors),) = detecting
    assert net.conf[0].weight[:21, 0, 0, 0].tolist() == VOC_ROWS
    assert torch.equal(priors, PriorBox(COCO_300)())


def test_own_classes_start_from_coco_by_a_map_and_others_new(call, coco_file, detecting, capsys):
    options = ("--resume_net", coco_file, "--lr", 0, "--date", "own", "--max_iters", 1)
    assert call(*options, "--class_map", "rod=baseball bat", "--test_frequency", 0) == 0
    assert "1 of 3 classes by name; new: cell, platelet" in capsys.readouterr().out
    weight = weights(call.folder / "own" / "last.pth")["conf.0.weight"]
    assert weight[[0, 3], 0, 0, 0].tolist() == [0, 35]
    assert 0 < weight[1:3].abs().max() < 1


def test_classes_that_a_checkpoint_has_not_learnt_are_named(
    call, coco_file, voc_folder, detecting, capsys
):
    test = ("--test", coco_file, "-d", "VOC", "--root", voc_folder)
    assert call(*test) == 2
    assert "has not learnt cell, platelet, rod" in capsys.readouterr().err
    everything = "cell=person,platelet=bicycle,rod=toothbrush"
    assert call(*test, "--class_map", everything) == 0
    ((net, _),) = detecting
    assert net.conf[0].weight[:4, 0, 0, 0].tolist() == [0, 1, 2, 80]
    assert call(*test, "--class_map", everything, "--retest") == 0
    assert call(*test, "--class_map", everything.replace("bicycle", "cat"), "--retest") == 2
    assert "class_map" in capsys.readouterr().err


def test_own_coco_categories_are_tested_and_tuned_from_a_published_file(
    call, coco_file, coco_folder, detecting, capsys
):
    for path in (coco_folder / "annotations").iterdir():
        text = path.read_text().replace('"thing"', '"zebra"').replace('"other"', '"person"')
        path.write_text(text)
    names = ["zebra", "person"]
    rows = [0, 1 + COCO_CLASSES.index("zebra"), 1]
    root = ("--root", coco_folder)
    for more in ((), ("-d", "COCO"), ("--classes", ",".join(names))):
        assert call("--test", coco_file, *root, *more) == 0
        net, priors = detecting.pop()
        assert net.conf[0].weight[: len(rows), 0, 0, 0].tolist() == rows
        assert torch.equal(priors, PriorBox(COCO_300)())
    swapped = ("--class_map", f"{names[0]}=toothbrush")
    assert call("--test", coco_file, *root, *swapped) == 0
    assert detecting.pop()[0].conf[0].weight[1, 0, 0, 0] == 80

    start = ("-d", "COCO", *root, "--resume_net", coco_file, "--max_iters", 1, "--date", "own")
    assert call(*start, "--crowds", "false", "--test_frequency", 0) == 0
    assert f"{len(names)} of {len(names)} classes by name" in capsys.readouterr().out
    checkpoint = call.folder / "own" / "last.pth"
    assert load_checkpoint(checkpoint)["config"]["crowds"] is False
    # The run's own data are still known beside a map.
    assert call("--test", checkpoint, *swapped) == 2
    assert "toothbrush is none of the classes" in capsys.readouterr().err


def test_prior_boxes_of_a_file_without_names_are_those_of_the_data(call, tmp_path, coco_folder):
    torch.save(build_net("tiny", 300, 4).state_dict(), tmp_path / "three.pth")
    torch.save(build_net("tiny", 300, 3).state_dict(), tmp_path / "own.pth")
    start = ("-d", "COCO", "--root", coco_folder, "--max_iters", 1, "--test_frequency", 0)
    start += ("--classes", "thing,other")
    assert call(*start, "--resume_net", tmp_path / "own.pth", "--date", "a") == 0
    assert load_checkpoint(call.folder / "a" / "last.pth")["config"]["priors"] == "COCO"
    assert call(*start, "--resume_net", tmp_path / "three.pth", "--date", "b") == 2
