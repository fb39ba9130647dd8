"""Prior boxes of one's own: sizes as text, files of them, and sizes fitted to data."""

import json
from itertools import product

import numpy as np
import pytest
import torch

from data import build_dataset
from data.config import COCO_512, MOBILE_300, VOC_300
from engine.options import Options
from engine.priors import (
    ENOUGH,
    MATCHED,
    best_overlaps,
    fit_to,
    fitted,
    positives,
    read_priors,
    share,
)
from engine.resolve import check_resumed, resolve
from layers import PriorBox
from models import prior_config
from models.info import load_detector
from train_test import main
from utils.checkpoint import load_checkpoint
from utils.errors import UserError

pytestmark = pytest.mark.usefixtures("tiny")


@pytest.mark.parametrize("config", [VOC_300, COCO_512, MOBILE_300])
def test_sizes_as_text_give_the_same_prior_boxes(config):
    version = "SSD_mobile" if config is MOBILE_300 else "SSD_HarDNet68"
    same = prior_config(version, config.text, config.size)
    assert torch.equal(PriorBox(same)(), PriorBox(config)())


def test_a_source_map_takes_a_second_square_box_of_any_size():
    text = "22+50,60,111+40,162,213,264,315"
    own = prior_config("SSD_HarDNet68", text, 300)
    assert own.text == text and own.num_priors == VOC_300.num_priors
    maps = PriorBox(own)().split(own.priors_per_map)
    for boxes, expected in zip(maps, (50, (60 * 111) ** 0.5, 40), strict=False):
        cells = 300 * boxes.reshape(-1, 6, 4)
        assert cells[len(cells) // 2, 1, 2:].tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize(("priors", "message"), [
    ("30+0,60,111,162,213,264,315", "map 1.*0 pixels"), ("30,60,111,162,213,264+9,315", "map 6"),
    ("30+1e200,60,111,162,213,264,315", "map 1.*1e\\+200"),
    ("30+,60,111,162,213,264,315", "choose"), ("3+4+5,60,111,162,213,264,315", "choose"),
    ("30,60,111,162,213,264,315+400", "map 7"), ("30,60", "2 sizes, but 7"),
    ("30,60,111,162,213,264,200", "rise"), ("0,1,2,3,4,5,6", "rise"),
    ("1,,2,3,4,5,6", "choose from VOC, COCO"), ("XYZ", "choose from VOC, COCO"),
])
def test_sizes_that_fit_no_network_are_refused(priors, message):
    with pytest.raises(ValueError, match=message):
        prior_config("SSD_HarDNet68", priors, 300)


def test_a_file_has_the_sizes_of_each_input(tmp_path):
    path = tmp_path / "priors.json"
    path.write_text(json.dumps({"300": [12.5, 25, 50.0, 100, 150, 200, 250], "64": "12+30,25"}))
    assert read_priors(str(path), 300) == "12.5,25,50,100,150,200,250"
    assert read_priors(str(path), 64) == "12+30,25"
    assert [read_priors(name, 300) for name in ("VOC", "fit", "1,2+3")] == ["VOC", "fit", "1,2+3"]
    for file, words in ((path, '"512".*--fit_priors'), (tmp_path / "no.json", "VOC, COCO, fit")):
        with pytest.raises(UserError, match=f"{file.name}.*{words}"):
            read_priors(str(file), 512)


def test_the_fit_serves_small_boxes_and_keeps_the_number_of_prior_boxes():
    rng = np.random.default_rng(0)
    sides = rng.uniform(0.03, 0.06, (300, 1)) * rng.uniform(0.8, 1.2, (300, 2))
    boxes = np.hstack([low := rng.uniform(0, 0.9, (300, 2)), low + sides])
    own = fitted(VOC_300, boxes, np.ones(300))
    assert own.num_priors == VOC_300.num_priors and own.max_sizes[-1] == VOC_300.max_sizes[-1]
    assert share(best_overlaps(VOC_300, boxes)) < 0.1 < 0.7 < share(best_overlaps(own, boxes))
    assert fitted(VOC_300, boxes[:0], np.ones(0)) == VOC_300


def test_the_number_of_positive_prior_boxes_is_the_mean_over_positions():
    ops = pytest.importorskip("torchvision.ops")
    rng = np.random.default_rng(0)
    sides = rng.uniform(0.05, 0.3, (6, 2))
    low = rng.uniform(0.3, 0.4, (4000, 6, 2))  # away from the border
    boxes = torch.from_numpy(np.concatenate([low, low + sides], 2)).float().flatten(0, 1)
    priors = ops.box_convert(PriorBox(VOC_300)(), "cxcywh", "xyxy")
    reached = [(ops.box_iou(part, priors) >= MATCHED).sum(1)
               for part in boxes.split(500)]
    counted = torch.cat(reached).view(4000, 6).double().mean(0)
    found = positives(VOC_300, boxes[:6].numpy())
    assert found == pytest.approx(counted.numpy(), rel=0.05, abs=0.05)
    assert positives(VOC_300, np.zeros((0, 4))).shape == (0,)


def test_of_sizes_that_serve_all_objects_the_fit_takes_those_with_most_positive_prior_boxes():
    # As on BCCD: platelets of 21 pixels, red cells of 55. All sizes here serve both at IoU 0.5.
    sides = np.repeat([[21], [55]], 50, 0) * np.ones((1, 2)) / 300
    boxes, labels = np.hstack([0.3 * np.ones((100, 2)), 0.3 + sides]), np.repeat([1, 2], 50)
    own = fitted(VOC_300, boxes, labels)
    assert share(best_overlaps(own, boxes)) == 1
    assert "+" in own.text
    small, large = np.mean(positives(own, boxes).reshape(2, 50), 1)
    for sizes in ("21,48,102,156,210,264,315", "21,32,90,148,206,264,315"):
        other = VOC_300.with_sizes(sizes)
        assert small + large > sum(np.mean(positives(other, boxes).reshape(2, 50), 1))

    def count(config):
        return positives(config, boxes).clip(max=ENOUGH).sum()

    for first, second, *free in product((19, 21, 23), (32, 48, 60), (28, 47, 60), (70, 90)):
        sizes = np.linspace(second, 264, 5).round().tolist()
        other = VOC_300.with_sizes(",".join(map(str, (first, *sizes, 315))))
        for config in (other, other.with_second(0, free[0]).with_second(1, free[1])):
            missed = share(best_overlaps(config, boxes)) < 1
            assert missed or count(own) > 0.95 * count(config), config.text


def test_a_run_keeps_the_prior_boxes_that_fit_its_data(voc_folder, tmp_path):
    common = ["-v", "tiny", "-s", "300", "--root", str(voc_folder), "--save_folder", str(tmp_path)]
    common += ["--date", "a", "-b", "2", "--num_workers", "0", "--device", "cpu", "--priors", "fit"]
    assert main([*common, "--max_iters", "1"]) == 0
    last = tmp_path / "tiny_300" / "a" / "last.pth"
    found = load_checkpoint(last)["config"]["priors"]
    options = resolve({"version": "tiny", "size": 300, "root": str(voc_folder)})
    dataset = build_dataset(options.dataset, options.root, options.train_sets)
    assert found == fit_to(dataset, VOC_300) and found != "VOC"
    _, info = load_detector(last)
    assert info.prior_config().text == found
    assert main([*common, "--max_iters", "2", "--resume", "auto"]) == 0
    assert main(["--test", str(last), "--device", "cpu"]) == 0
    assert main([*common[:-1], "VOC", "--resume", "auto", "--max_iters", "3"]) == 2
    assert main([*common[:8], "--date", "b", "--resume_net", str(last), "--priors", "COCO"]) == 2


def test_the_prior_boxes_of_a_run_stay():
    stored = Options(priors="1,2,3,4,5,6,7")
    for same in ("1,2,3,4,5,6,7", "fit"):  # a fit is compared once the data are read
        check_resumed({"priors": same}, stored)
    with pytest.raises(UserError, match="--priors COCO.*1,2,3"):
        check_resumed({"priors": "COCO"}, stored)
