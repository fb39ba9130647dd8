"""Priors, box geometry, matching and the multibox loss against goldens and literal references."""

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import data.config as config
from layers import L2Norm, MultiBoxLoss, PriorBox
from layers.boxes import decode, encode, iou, to_centre_size, to_corners
from layers.matching import match, pad_targets
from layers.multibox_loss import _ConfidenceLoss, _hard_negatives, _location_loss

GOLDENS = Path(__file__).parent / "goldens"
VARIANCE = (0.1, 0.2)
CPU = torch.device("cpu")
PRIORS = PriorBox(config.VOC_300)()


def match_one(target, priors, threshold=0.5):
    labels, offsets = match(pad_targets([target], CPU), priors, threshold, VARIANCE)
    return labels[0], offsets[0]


# ---------------------------------------------------------------- priors


@pytest.mark.parametrize("name", ["VOC_300", "VOC_512", "COCO_300", "COCO_512"])
def test_priors_equal_the_published_ones(name):
    preset = getattr(config, name)
    priors = PriorBox(preset)()
    assert priors.dtype == torch.float32
    assert len(priors) == preset.num_priors
    np.testing.assert_allclose(priors, np.load(GOLDENS / "priors.npz")[name], rtol=0, atol=1e-7)


def test_priors_of_one_cell_by_hand():
    # Map 0, row 1, column 2: cell (38 + 2), 6 boxes a cell; min 30, max 60, step 8.
    s, c = 30 / 300, (2.5 * 8 / 300, 1.5 * 8 / 300)
    shapes = [(s, s), (sqrt(s * 0.2), sqrt(s * 0.2))]
    for ratio in (2, 3):
        shapes += [(s * sqrt(ratio), s / sqrt(ratio)), (s / sqrt(ratio), s * sqrt(ratio))]
    expected = torch.tensor([[*c, *shape] for shape in shapes])
    torch.testing.assert_close(PRIORS[40 * 6 : 41 * 6], expected)


def test_priors_are_a_buffer_that_no_checkpoint_carries():
    module = PriorBox(config.COCO_300)
    assert [name for name, _ in module.named_buffers()] == ["boxes"]
    assert not module.state_dict()
    assert module.to(torch.float64)().dtype == torch.float64


def test_preset_with_a_missing_entry_is_refused():
    with pytest.raises(ValueError, match="'steps': 5"):
        config.PriorConfig(**{**vars(config.VOC_300), "steps": (8, 16, 32, 64, 100)})


# ---------------------------------------------------------------- boxes


def test_corner_and_centre_boxes_round_trip():
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.4], [-0.5, 0.0, 1.5, 1.0]])
    torch.testing.assert_close(to_centre_size(boxes)[0], torch.tensor([0.3, 0.3, 0.4, 0.2]))
    torch.testing.assert_close(to_corners(to_centre_size(boxes)), boxes)


def test_iou_by_hand():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
    b = torch.tensor([[1.0, 1.0, 3.0, 3.0], [0.0, 0.0, 2.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
    expected = torch.tensor([[1 / 7, 1 / 2, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(iou(a, b), expected)
    assert iou(a[1:], a[1:]).item() == 0, "two empty boxes overlap by 0, not NaN"


def test_decoding_inverts_encoding():
    generator = torch.Generator().manual_seed(0)
    corners = to_corners(torch.rand(len(PRIORS), 4, generator=generator) * 0.9 + 0.05)
    found = decode(encode(corners, PRIORS, VARIANCE), PRIORS, VARIANCE)
    torch.testing.assert_close(found, corners, rtol=1e-4, atol=1e-5)


def test_encoding_by_hand_and_finite_for_a_box_without_area():
    prior = torch.tensor([[0.5, 0.5, 0.2, 0.4]])
    box = torch.tensor([[0.5, 0.4, 0.7, 0.6]])
    expected = [(0.6 - 0.5) / 0.02, 0.0, 0.0, np.log(0.2 / 0.4) / 0.2]
    torch.testing.assert_close(encode(box, prior, VARIANCE)[0], torch.tensor(expected).float())
    assert encode(torch.zeros(1, 4), prior, VARIANCE).isfinite().all()


def test_l2norm_scales_every_position_to_its_weight():
    x = torch.randn(2, 5, 3, 4)
    norm = L2Norm(5)
    torch.testing.assert_close(norm(x).norm(dim=1), torch.full((2, 3, 4), 20.0))
    assert not norm(torch.zeros(1, 5, 1, 1)).isnan().any()


# ---------------------------------------------------------------- matching


def literal_match(target, priors, threshold=0.5):
    """The rule of the text, box by box."""
    overlaps = iou(target[:, :4], to_corners(priors))
    owner = overlaps.argmax(0).tolist()
    positive = (overlaps.max(0).values >= threshold).tolist()
    for j in range(len(target)):
        claimed = int(overlaps[j].argmax())
        owner[claimed], positive[claimed] = j, True
    labels = [int(target[o, 4]) if p else 0 for o, p in zip(owner, positive, strict=True)]
    return torch.tensor(labels), target[owner, :4]


def random_targets(generator, count):
    centre = torch.rand(count, 2, generator=generator)
    size = torch.rand(count, 2, generator=generator) * 0.4 + 0.01
    corners = to_corners(torch.cat([centre, size], 1)).clamp(0, 1)
    labels = torch.randint(1, 5, (count, 1), generator=generator)
    return torch.cat([corners, labels], 1)


@pytest.mark.parametrize("index", [False, True])
def test_batched_matching_equals_the_literal_rule(index):
    generator = torch.Generator().manual_seed(1)
    targets = [random_targets(generator, n) for n in (3, 0, 1, 17, 60)]
    labels, offsets = match(pad_targets(targets, CPU), PRIORS, 0.5, VARIANCE, index)
    assert offsets.isfinite().all()
    for target, label, offset in zip(targets, labels, offsets, strict=True):
        if not len(target):
            assert not label.any()
            continue
        expected, owner = literal_match(target, PRIORS)
        assert torch.equal(label, expected)
        encoded = encode(owner, PRIORS, VARIANCE)
        torch.testing.assert_close(offset[expected > 0], encoded[expected > 0])


def test_targets_are_padded_with_rows_that_have_no_label():
    targets = [torch.full((2, 5), 0.5), torch.zeros(0, 5), torch.ones(1, 5).double()]
    padded = pad_targets(targets, CPU)
    assert padded.dtype == torch.float32
    assert padded[..., 4].tolist() == [[0.5, 0.5], [0, 0], [1, 0]]
    assert pad_targets([torch.zeros(0, 5)], CPU).shape == (1, 1, 5)


def test_of_two_boxes_on_one_prior_the_later_wins():
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]])
    first, second = [0.3, 0.3, 0.7, 0.7, 1.0], [0.32, 0.3, 0.7, 0.7, 2.0]
    for pair, winner in (((first, second), 2), ((second, first), 1)):
        labels, offsets = match_one(torch.tensor(pair), priors)
        assert labels.tolist() == [winner, 0]
        expected = encode(torch.tensor(pair[1])[None, :4], priors[:1], VARIANCE)[0]
        torch.testing.assert_close(offsets[0], expected)


def test_a_box_larger_than_the_image_matches_the_largest_priors_with_finite_offsets():
    labels, offsets = match_one(torch.tensor([[-0.2, -0.1, 1.3, 1.2, 3.0]]), PRIORS)
    assert labels.any()
    assert PRIORS[labels > 0, 2:].min() > 0.5
    assert offsets.isfinite().all()


# ---------------------------------------------------------------- loss


def literal_loss(loc, conf, priors, targets):
    """Image by image, prior by prior set, straight from the text."""
    loss_loc = loss_conf = 0.0
    positives = 0
    for i, target in enumerate(targets):
        labels = torch.zeros(len(priors), dtype=torch.long)
        if len(target):
            labels, owner = literal_match(target, priors)
        positive = labels > 0
        if positive.any():
            encoded = encode(owner, priors, VARIANCE)[positive]
            loss_loc += F.smooth_l1_loss(loc[i][positive], encoded, reduction="sum")
        entropy = F.cross_entropy(conf[i], labels, reduction="none")
        wanted = min(3 * int(positive.sum()), len(priors) - 1)
        negatives = entropy[~positive].sort(descending=True).values[:wanted]
        loss_conf += entropy[positive].sum() + negatives.sum()
        positives += int(positive.sum())
    return loss_loc / positives, loss_conf / positives


@pytest.mark.parametrize("name", ["COCO_300", "COCO_512"])
def test_loss_equals_the_published_one(name):
    golden = np.load(GOLDENS / f"multibox_loss_{name}.npz")
    priors = PriorBox(getattr(config, str(golden["config"])))()
    batch, classes = int(golden["batch"]), int(golden["num_classes"])
    noise = np.random.RandomState(int(golden["seed"]))
    loc = noise.standard_normal((batch, len(priors), 4)).astype(np.float32)
    conf = (2 * noise.standard_normal((batch, len(priors), classes))).astype(np.float32)
    loc, conf = (torch.from_numpy(x).requires_grad_() for x in (loc, conf))
    rows = torch.from_numpy(golden["targets"]).float()
    targets = [rows[rows[:, 0] == i, 1:] for i in range(batch)]

    labels, offsets = MultiBoxLoss(classes).match(targets, priors)
    np.testing.assert_array_equal(labels, golden["matched_label"])
    index = torch.from_numpy(golden["positive_index"]).long()
    np.testing.assert_allclose(offsets[index[:, 0], index[:, 1]], golden["positive_loc_target"],
                               rtol=1e-4, atol=1e-4)

    losses = MultiBoxLoss(classes)((loc, conf), priors, targets)
    sum(losses).backward()
    measured = [x.item() for x in (*losses, loc.grad.norm(), conf.grad.norm())]
    names = ("loss_loc", "loss_conf", "grad_loc_norm", "grad_conf_norm")
    assert measured == pytest.approx([float(golden[k]) for k in names], rel=1e-5)


@pytest.mark.parametrize("counts", [(4, 0, 9), (1,), (30, 2)])
def test_loss_equals_a_literal_reference(counts):
    (loc, conf), targets = random_batch(counts)
    losses = MultiBoxLoss(5)((loc, conf), PRIORS, targets)
    torch.testing.assert_close(losses, literal_loss(loc, conf, PRIORS, targets))


def test_batch_without_a_positive_has_zero_loss_and_zero_gradient():
    outputs, targets = random_batch((0, 0))
    losses = MultiBoxLoss(5)(outputs, PRIORS, targets)
    sum(losses).backward()
    assert not any(losses) and not any(x.grad.any() for x in outputs)


def test_negatives_are_capped_when_nearly_every_prior_is_positive():
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.41, 0.4], [0.1, 0.1, 0.1, 0.1]])
    target = torch.tensor([[0.3, 0.3, 0.7, 0.7, 1.0]])
    loc, conf = torch.zeros(1, 3, 4), torch.zeros(1, 3, 2)
    _, loss_conf = MultiBoxLoss(2)((loc, conf), priors, [target])
    # Two positives and the one negative there is: three times log 2 over two positives.
    assert float(loss_conf) == pytest.approx(3 * np.log(2) / 2)


def random_batch(counts, dtype=torch.float32):
    """Predictions of 5 classes that want a gradient, and targets."""
    generator = torch.Generator().manual_seed(sum(counts))
    targets = [random_targets(generator, n) for n in counts]
    outputs = (torch.randn(len(counts), len(PRIORS), n, generator=generator) for n in (4, 5))
    return [x.to(dtype).requires_grad_() for x in outputs], targets


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradient_of_every_prior_masked_equal_those_of_the_chosen_ones(dtype):
    (loc, conf), targets = random_batch((4, 0, 9), dtype)
    labels, offsets = MultiBoxLoss(5).match(targets, PRIORS)
    results = []
    for index in (False, True):
        losses = [_location_loss(loc, labels, offsets, index)]
        losses.append(_ConfidenceLoss.apply(conf, labels, 0, index))
        gradients = torch.autograd.grad(sum(losses), (loc, conf))
        assert [g.dtype for g in gradients] == [dtype] * 2
        results.append([*losses, *gradients])
    for masked, indexed in zip(*results, strict=True):
        torch.testing.assert_close(masked, indexed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_of_half_precision_outputs_is_that_of_float32_rounded_once(dtype):
    outputs, targets = random_batch((4, 9), dtype)
    wide = [x.detach().float().requires_grad_() for x in outputs]
    losses = [MultiBoxLoss(5)(x, PRIORS, targets) for x in (outputs, wide)]
    torch.testing.assert_close(*losses, rtol=1e-6, atol=0)
    sum(map(sum, losses)).backward()
    for half, whole, rounding in zip(outputs, wide, (None, 0), strict=True):
        torch.testing.assert_close(half.grad, whole.grad.to(dtype), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("index", [False, True])
def test_gradient_equals_finite_differences(index):
    generator = torch.Generator().manual_seed(0)
    loc, conf, offsets = (
        torch.randn(2, 9, n, generator=generator, dtype=torch.float64) for n in (4, 3, 4)
    )
    labels = torch.tensor([[0, 2, 0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0, 1]])
    for loss, x in ((lambda x: _ConfidenceLoss.apply(x, labels, 0, index), conf),
                    (lambda x: _location_loss(x, labels, offsets, index), loc)):
        assert torch.autograd.gradcheck(loss, x.requires_grad_())


@pytest.mark.parametrize("index", [False, True])
def test_the_gradient_does_not_depend_on_the_order_of_outputs_in_memory(index):
    (_, conf), targets = random_batch((4, 9))
    labels, _ = MultiBoxLoss(5).match(targets, PRIORS)
    other = conf.detach().mT.contiguous().mT.requires_grad_()
    gradients = [torch.autograd.grad(_ConfidenceLoss.apply(x, labels, 0, index), x)[0]
                 for x in (conf, other)]  # fmt: skip
    assert not other.is_contiguous() and gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_an_image_without_objects_teaches_by_its_hardest_negatives():
    """It has 7 negatives, and counts as 7 // 3 positives beside those of the other image."""
    torch.manual_seed(0)
    conf = torch.randn(2, 40, 3, requires_grad=True)
    target = torch.tensor([[0.1, 0.1, 0.6, 0.6, 1.0]])
    priors = torch.rand(40, 4) * 0.5 + 0.2
    outputs, targets = (torch.zeros(2, 40, 4), conf), [target, torch.zeros(0, 5)]
    published, ours = MultiBoxLoss(3), MultiBoxLoss(3, least_negatives=7)
    (gradient,) = torch.autograd.grad(published(outputs, priors, targets)[1], conf)
    assert gradient[0].any() and not gradient[1].any()
    (gradient,) = torch.autograd.grad(ours(outputs, priors, targets)[1], conf)
    losses = F.cross_entropy(conf[1], torch.zeros(40, dtype=torch.long), reduction="none")
    taught = gradient[1].any(1).nonzero().flatten()
    assert set(taught.tolist()) == set(losses.topk(7).indices.tolist())
    labels, _ = ours.match(targets, priors)
    count = max(int((labels[0] > 0).sum()), 2) + 2
    expected = conf[1].softmax(1)[taught] - torch.tensor([1.0, 0, 0])
    torch.testing.assert_close(gradient[1, taught], expected / count)


def test_second_derivative_is_refused():
    conf = torch.randn(1, 4, 3, requires_grad=True)
    loss = _ConfidenceLoss.apply(conf, torch.tensor([[1, 0, 0, 0]]), 0, True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(loss, conf, create_graph=True)


@pytest.mark.parametrize("least", [0, 7])
@pytest.mark.parametrize("index", [False, True])
def test_of_equal_losses_the_earlier_priors_are_negatives(index, least):
    generator = torch.Generator().manual_seed(3)
    # Few different losses, so that nearly every border lies among equal ones.
    losses = torch.randint(0, 4, (40, 30), generator=generator).float()
    labels = torch.randint(-12, 3, (40, 30), generator=generator).clamp(min=0)
    labels[0], labels[1] = 0, 1
    chosen = _hard_negatives(losses, labels, least, index)
    for row, label, found in zip(losses.tolist(), labels.tolist(), chosen, strict=True):
        order = sorted((i for i in range(30) if not label[i]), key=lambda i: (-row[i], i))
        wanted = order[: max(least, 3 * (30 - len(order)))]
        assert found.nonzero().squeeze(1).tolist() == sorted(wanted)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("index", [False, True])
def test_negative_that_is_no_number_is_noticed(index, value):
    conf = torch.zeros(1, 50, 3)
    conf[0, 7, 1] = value
    labels = torch.zeros(1, 50, dtype=torch.long)
    labels[0, 3] = 1
    assert not _ConfidenceLoss.apply(conf, labels, 0, index).isfinite()


def test_parts_of_a_batch_with_one_count_add_up_to_the_whole():
    outputs, targets = random_batch((4, 0, 9))
    criterion = MultiBoxLoss(5)
    whole = criterion(outputs, PRIORS, targets)
    expected = torch.autograd.grad(sum(whole), outputs)
    labels, offsets = criterion.match(targets, PRIORS)
    count = (labels > 0).sum()
    for positives in (count, int(count)):
        parts = [criterion.loss([x[part] for x in outputs], labels[part], offsets[part], positives)
                 for part in (slice(1), slice(1, 3))]
        summed = [sum(losses) for losses in zip(*parts, strict=True)]
        torch.testing.assert_close(summed, list(whole))
        torch.testing.assert_close(torch.autograd.grad(sum(summed), outputs), expected)


def test_loss_off_the_cpu_needs_no_value_of_the_data():
    """What would make a GPU's host wait cannot even run on tensors without data."""
    outputs, targets = random_batch((4, 0, 9))
    outputs = [x.detach().to("meta").requires_grad_() for x in outputs]
    losses = MultiBoxLoss(5)(outputs, PRIORS.to("meta"), targets)
    sum(losses).backward()
    assert [loss.dtype for loss in losses] == [torch.float32] * 2
    assert all(x.grad.shape == x.shape for x in outputs)
    with pytest.raises(RuntimeError, match="meta"):
        outputs[0][outputs[0] > 0]


def test_target_that_cannot_be_meant_is_refused():
    for target, words in (
        (torch.tensor([[0.1, 0.1, 0.2, 0.2, 3.0]]), r"label outside 1\.\.2: \[3\.0\]"),
        (torch.tensor([[0.1, 0.1, 0.2, 0.2, 0.0]]), r"label outside 1\.\.2: \[0\.0\]"),
        (torch.zeros(2, 4), r"shape \[2, 4\]"),
    ):
        with pytest.raises(ValueError, match=words):
            MultiBoxLoss(3).match([target], PRIORS)


def test_outputs_that_do_not_fit_the_priors_are_refused_with_both_numbers():
    few, many = ([torch.zeros(1, count, n) for n in (4, 3)] for count in (11620, 32756))
    with pytest.raises(ValueError, match="32756.*11620"):
        MultiBoxLoss(3)(many, PRIORS, [torch.zeros(0, 5)])
    labels, offsets = torch.zeros(2, 11620, dtype=torch.long), torch.zeros(2, 11620, 4)
    with pytest.raises(ValueError, match="2 targets.*11620 priors"):
        MultiBoxLoss(3).loss(few, labels, offsets, 1)


def test_the_loss_of_no_images_is_nothing():
    loc, conf = (torch.zeros(0, 7, 4, requires_grad=True) for _ in "lc")
    losses = MultiBoxLoss(4)((loc, conf), torch.rand(7, 4), [])
    sum(losses).backward()
    assert [loss.item() for loss in losses] == [0, 0] and conf.grad.shape == (0, 7, 4)
