"""Rows of class heads gathered by name, on heads whose rows hold their own number."""

import pytest
import torch

from data.config import COCO_CLASSES, VOC_CLASSES
from models import build_net
from models.transfer import (
    VOC_TO_COCO,
    check_known,
    match_classes,
    parse_class_map,
    transfer_classes,
)
from utils.errors import UserError


def numbered(boxes, classes, inputs=3):
    """A head whose row of prior box a and class c (0: background) is full of 100 a + c."""
    rows = [100.0 * a + c for a in range(boxes) for c in range(classes + 1)]
    bias = torch.tensor(rows)
    return {"weight": bias.view(-1, 1, 1, 1).expand(-1, inputs, 3, 3).clone(), "bias": bias}


def detector(classes, boxes=(6, 4)):
    heads = {f"conf.{i}.{name}": tensor for i, a in enumerate(boxes)
             for name, tensor in numbered(a, classes).items()}  # fmt: skip
    return {"base.0.weight": torch.ones(2), "loc.0.weight": torch.ones(24, 3, 3, 3), **heads}


# by hand: position in the list of COCO's 80 classes, from 1
VOC_ROWS = {
    "aeroplane": 5, "bicycle": 2, "bird": 15, "boat": 9, "bottle": 40, "bus": 6, "car": 3,
    "cat": 16, "chair": 57, "cow": 20, "diningtable": 61, "dog": 17, "horse": 18, "motorbike": 4,
    "person": 1, "pottedplant": 59, "sheep": 19, "sofa": 58, "train": 7, "tvmonitor": 63,
}  # fmt: skip


def test_voc_gathers_its_21_rows_of_every_box_from_cocos_81():
    state = detector(80)
    result, new = transfer_classes(state, COCO_CLASSES, VOC_CLASSES)
    assert new == []
    wanted = [0, *(VOC_ROWS[name] for name in VOC_CLASSES)]
    for i, boxes in enumerate((6, 4)):
        rows = torch.tensor([100.0 * a + c for a in range(boxes) for c in wanted])
        assert torch.equal(result[f"conf.{i}.bias"], rows)
        assert result[f"conf.{i}.weight"].shape == (21 * boxes, 3, 3, 3)
        assert (result[f"conf.{i}.weight"] == rows.view(-1, 1, 1, 1)).all()
    assert result["base.0.weight"] is state["base.0.weight"]
    assert result["loc.0.weight"] is state["loc.0.weight"]
    assert list(result) == list(state) and state["conf.0.bias"].shape == (81 * 6,)


@torch.no_grad()
def test_scores_of_the_21_classes_are_those_of_the_81():
    torch.manual_seed(0)
    coco, voc = (build_net("SSD_HarDNet39ds", 300, classes).eval() for classes in (81, 21))
    state, _ = transfer_classes(coco.state_dict(), COCO_CLASSES, VOC_CLASSES)
    voc.load_state_dict(state, strict=True)
    image = torch.randn(1, 3, 300, 300)
    (loc, conf), (loc81, conf81) = voc(image), coco(image)
    assert torch.equal(loc, loc81)
    torch.testing.assert_close(conf, conf81[..., [0, *VOC_ROWS.values()]], atol=1e-4, rtol=1e-4)


def test_there_are_80_classes_and_20_of_them_are_vocs():
    assert len(set(COCO_CLASSES)) == 80
    assert {VOC_TO_COCO.get(name, name) for name in VOC_CLASSES} < set(COCO_CLASSES)
    assert set(VOC_TO_COCO) < set(VOC_CLASSES)


def test_unknown_classes_start_new_and_the_same_seed_gives_the_same():
    state, names = detector(3), ("a", "b", "c")
    own = ("zebra", "c", "a")
    result, new = transfer_classes(state, names, own, seed=1)
    assert new == ["zebra"]
    weight = result["conf.1.weight"].unflatten(0, (4, 4))
    bias = result["conf.1.bias"].view(4, 4)
    for a in range(4):
        assert bias[a].tolist() == [100 * a, 0, 100 * a + 3, 100 * a + 1]
        for row, value in ((0, 100 * a), (2, 100 * a + 3), (3, 100 * a + 1)):
            assert (weight[a, row] == value).all()
    fresh = weight[:, 1]
    bound = (3 * 3 * 3) ** -0.5  # PyTorch's default: uniform within 1 / sqrt(inputs)
    assert 0.8 * bound < fresh.abs().max() <= bound and fresh.unique().numel() == fresh.numel()
    again, _ = transfer_classes(state, names, own, seed=1)
    assert torch.equal(again["conf.1.weight"], result["conf.1.weight"])
    other, _ = transfer_classes(state, names, own, seed=2)
    assert not torch.equal(other["conf.1.weight"], result["conf.1.weight"])


def test_the_same_classes_change_nothing_and_others_keep_only_background():
    state = detector(3)
    result, new = transfer_classes(state, "abc", "abc")
    assert new == [] and all(torch.equal(result[key], state[key]) for key in state)
    result, new = transfer_classes(state, "abc", "xy")
    assert new == ["x", "y"]
    assert result["conf.1.bias"].tolist() == [0, 0, 0, 100, 0, 0, 200, 0, 0, 300, 0, 0]


def test_a_class_map_decides_before_equal_names_and_may_use_a_class_twice():
    own = ("car", "lorry", "van", "aeroplane", "tv")
    rows = match_classes(COCO_CLASSES, own, {"lorry": "truck", "car": "bus", "van": "truck"})
    assert rows == [5, 7, 7, 4, 62]
    assert match_classes(VOC_CLASSES, ("couch", "sofa", "x")) == [17, 17, None]


@pytest.mark.parametrize("class_map", [{"lorry": "trick"}, {"lory": "truck"}])
def test_a_class_map_with_an_unknown_name_is_refused(class_map):
    with pytest.raises(UserError, match="tric?k|lory .*none of the classes"):
        match_classes(COCO_CLASSES, ("lorry",), class_map)


def test_a_detector_must_know_the_classes_that_it_is_tested_on():
    check_known("coco.pth", COCO_CLASSES, ("car", "tvmonitor", "lorry"), {"lorry": "truck"})
    with pytest.raises(UserError, match=r"coco\.pth has not learnt lorry, van; .*--class_map"):
        check_known("coco.pth", COCO_CLASSES, ("car", "lorry", "van"))


def test_a_head_of_another_number_of_classes_is_refused():
    with pytest.raises(UserError, match=r"conf\.0\.weight has 24 rows, .* 4 classes"):
        transfer_classes(detector(3), "abcd", "ab")
    with pytest.raises(UserError, match=r"conf\.0\.bias has 0 rows"):
        transfer_classes({"conf.0.bias": torch.tensor(1.0)}, "abc", "ab")
    whole = {key: tensor.int() for key, tensor in detector(3).items()}
    with pytest.raises(UserError, match=r"conf\.0\.\w+ has whole numbers"):
        transfer_classes(whole, "abc", "xy")


def test_class_maps_are_read_from_the_option_or_a_file(tmp_path):
    wanted = {"lorry": "truck", "TV set": "tv"}
    assert parse_class_map("lorry=truck, TV set = tv") == wanted
    (tmp_path / "map.txt").write_text("lorry=truck\n\nTV set=tv\n", "utf-8")
    assert parse_class_map(str(tmp_path / "map.txt")) == wanted
    for encoding in ("utf-8-sig", "utf-16"):  # as Windows writes
        (tmp_path / "windows.txt").write_text("lorry=truck\nTV set=tv", encoding)
        assert parse_class_map(str(tmp_path / "windows.txt")) == wanted
    (tmp_path / "lr=1").mkdir()
    (tmp_path / "map.txt").rename(tmp_path / "lr=1" / "map.txt")
    assert parse_class_map(str(tmp_path / "lr=1" / "map.txt")) == wanted
    assert len(parse_class_map(",".join(f"{i}=x" for i in range(2000)))) == 2000


@pytest.mark.parametrize(("text", "words"), [
    ("a=b,c", "'c', which is not of the form own=other"), ("a=", "'a=', which is not of the form"),
    ("a=b,a=c", "'a=c', which is a second entry"),
    ("gone.txt", r"gone.txt is neither .* nor a file"),
])
def test_a_bad_class_map_is_refused_by_its_entry(text, words):
    with pytest.raises(UserError, match=words):
        parse_class_map(text)


def test_the_norm_of_a_new_class_starts_as_batch_norms_do():
    state = build_net("SSD_HarDNet39dsbn", 300, 3).state_dict()
    for key in state:
        if key.startswith("conf.") and state[key].is_floating_point():
            state[key] = torch.full_like(state[key], 5)
    result, new = transfer_classes(state, ("a", "b"), ("b", "c"))
    start = {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}
    for name, value in start.items():
        rows = result[f"conf.0.norm.{name}"].reshape(6, 3)  # a box's background, b, c
        assert torch.equal(rows, torch.tensor([5.0, 5, value]).expand(6, 3))
    assert new == ["c"]
    build_net("SSD_HarDNet39dsbn", 300, 3).load_state_dict(result, strict=True)
