"""What only a CUDA GPU can show: the same numbers as on the CPU, and training at each precision.

Tests that compare two devices also compare the CPU with itself at another rounding.
"""

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from data.config import VOC_300
from engine.distributed import World, leave
from layers import Detect, MultiBoxLoss, PriorBox
from models import BACKBONES, build_net
from utils.checkpoint import load_checkpoint
from utils.nms import METHODS, backend, backend_reason, backends, batched_nms, nms

gpu = pytest.mark.gpu
on_each = pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.float64), pytest.param("cuda", torch.float32, marks=gpu)]
)


@pytest.fixture
def exact_float32(monkeypatch):
    """cuDNN's default convolutions are TF32, with a tenth of float32's digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def random_batch(batch=3, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    priors = PriorBox(VOC_300)()
    loc = torch.randn(batch, len(priors), 4, generator=generator)
    conf = torch.randn(batch, len(priors), classes, generator=generator) * 3
    corners = torch.rand(7, 2, 2, generator=generator).sort(1).values.reshape(7, 4)
    target = torch.cat([corners, torch.randint(1, classes, (7, 1), generator=generator)], 1)
    return loc, conf, priors, [target, torch.zeros(0, 5), target[:2]]


@gpu
@pytest.mark.parametrize("version", BACKBONES)
def test_network_gives_the_same_outputs_as_on_the_cpu(version, exact_float32):
    net = build_net(version, 300, 5).eval()
    images = torch.randn(2, 3, 300, 300) * 50
    with torch.no_grad():
        expected = net(images)
        measured = net.cuda()(images.cuda())
    for a, b in zip(measured, expected, strict=True):
        assert (a.cpu() - b).norm() < 1e-4 * b.norm()


def loss_and_gradients(loc, conf, priors, targets, device, dtype):
    inputs = [x.to(device, dtype, copy=True).requires_grad_() for x in (loc, conf)]
    losses = MultiBoxLoss(5)(inputs, priors.to(device), targets)
    return [x.cpu().float() for x in (*losses, *torch.autograd.grad(sum(losses), inputs))]


@on_each
def test_loss_and_gradients_equal_the_cpu(device, dtype):
    batch = random_batch()
    expected = loss_and_gradients(*batch, "cpu", torch.float32)
    for a, b in zip(loss_and_gradients(*batch, device, dtype), expected, strict=True):
        torch.testing.assert_close(a, b)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_of_a_batch_does_not_wait_for_the_gpu(dtype):
    loc, conf, priors, targets = random_batch()
    inputs = [x.to("cuda", dtype).requires_grad_() for x in (loc, conf)]
    priors, criterion = priors.cuda(), MultiBoxLoss(5)
    sum(criterion(inputs, priors, targets)).backward()  # libraries load, memory is taken
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        labels, offsets = criterion.match(targets, priors)
        losses = criterion.loss(inputs, labels, offsets, (labels > 0).sum())
        gradients = torch.autograd.grad(sum(losses), inputs)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert all(g.isfinite().all() and g.any() for g in gradients)


def distant_scores(batch=3, classes=5, candidates=600):
    """Network outputs with candidates whose scores are 0.0015 apart: rounding reorders none."""
    loc, conf, priors, _ = random_batch(batch, classes)
    generator = torch.Generator().manual_seed(1)
    conf = torch.full_like(conf, -20)
    conf[..., 0] = 0
    scores = torch.linspace(0.05, 0.95, candidates)
    for image in conf:
        chosen = torch.randperm(len(priors), generator=generator)[:candidates]
        labels = torch.randint(1, classes, (candidates,), generator=generator)
        image[chosen, labels] = scores.logit()
    return loc, conf, priors


@on_each
def test_detections_equal_the_cpu(device, dtype):
    loc, conf, priors = distant_scores()
    sizes = [(640, 480), (300, 300), (33, 900)]
    expected = Detect()(loc, conf, priors, sizes)
    noise = torch.randn(conf.shape, generator=torch.Generator().manual_seed(2))
    outputs = [x.to(device, dtype) for x in (loc, conf * (1 + 1e-6 * noise))]
    measured = Detect()(*outputs, priors.to(device), sizes)
    for a, b in zip(measured, expected, strict=True):
        assert len(b["labels"]) > 100 and torch.equal(a["labels"].cpu(), b["labels"])
        torch.testing.assert_close(a["scores"].cpu(), b["scores"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(a["boxes"].cpu(), b["boxes"], rtol=1e-4, atol=1e-2)


@pytest.fixture(params=["cuda", "torchvision", "torch"])
def routine(request, monkeypatch):
    """Each routine that can serve a GPU; "cuda" is there after ./make.sh with nvcc."""
    if request.param == "cuda":
        if backend("cuda") != "cuda":
            pytest.skip(backend_reason("cuda"))
    else:
        monkeypatch.setattr(backends, "library", lambda index: (None, "a test"))
    if request.param == "torch":
        monkeypatch.setattr(backends, "torchvision", lambda: (None, "a test"))
    assert backend("cuda") == request.param
    return request.param


def random_boxes(count, span=300):
    rng = np.random.default_rng(0)
    corners = rng.uniform(0, span, (count, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(1, 60, (count, 2))], 1)
    scores = rng.random(count).round(3)  # with ties
    return torch.from_numpy(boxes).float(), torch.from_numpy(scores).float()


@gpu
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pixel", [True, False])
@pytest.mark.parametrize("groups", [1, 30, 20_000])
def test_batched_nms_keeps_the_boxes_that_the_cpu_keeps(routine, method, pixel, groups):
    boxes, scores = random_boxes(5000)
    labels = torch.from_numpy(np.random.default_rng(1).integers(0, groups, 5000))
    rest = (0.45, 20, pixel, method, 0.5, 0.05)
    expected = batched_nms(boxes, scores, labels, *rest)
    # One number in, all others on: the same memory, not aligned to 16 bytes.
    shifted = torch.cat([boxes.new_zeros(1), boxes.flatten()]).cuda()[1:].view(-1, 4)
    measured = batched_nms(shifted, scores.cuda(), labels.cuda(), *rest)
    assert measured[0].is_cuda
    assert torch.equal(measured[0].cpu(), expected[0])
    torch.testing.assert_close(measured[1].cpu(), expected[1], rtol=1e-6, atol=0)


@gpu
def test_nms_of_a_gpu_keeps_the_boxes_that_the_cpu_keeps(routine):
    boxes, scores = random_boxes(30_000, span=2000)
    for count in (0, 1, 30_000):
        dets = torch.cat([boxes, scores[:, None]], 1)[:count]
        assert torch.equal(nms(dets.cuda(), 0.45).cpu(), nms(dets, 0.45))
    with pytest.raises(ValueError, match="contain NaN"):
        nms(torch.full((2, 5), torch.nan).cuda(), 0.45)


@gpu
def test_the_kernel_neither_waits_nor_copies_before_its_end():
    if backend("cuda") != "cuda":
        pytest.skip(backend_reason("cuda"))
    boxes, scores = (x.cuda() for x in random_boxes(5000))
    launched = []
    for groups in (1, 2000):
        labels = torch.arange(5000, device="cuda") % groups
        batched_nms(boxes, scores, labels, 0.45, 50)
        with torch.profiler.profile() as profile:
            batched_nms(boxes, scores, labels, 0.45, 50)
        events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        names = [e.name for e in sorted(events, key=lambda e: e.time_range.start)]
        (kernel,) = (i for i, name in enumerate(names) if "select_kernel" in name)
        assert not [name for name in names[:kernel] if "DtoH" in name]
        # What follows depends on the number of kept boxes: PyTorch sorts few of them in one launch.
        launched.append([n for n in names[:kernel] if "Memcpy" not in n and "Memset" not in n])
    assert launched[0] == launched[1]


@gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_training_testing_and_resuming_run_at_each_precision(amp, voc_folder, tmp_path):
    from train_test import main

    common = [
        "-d", "VOC", "--root", str(voc_folder), "-s", "300", "-b", "2", "--device", "cuda",
        "--num_workers", "1", "--save_folder", str(tmp_path), "--date", "run",
    ]  # fmt: skip
    if amp == "fp16":  # with norms of one step the activations reach 200,000, fp16 ends at 65,504
        common += ["--test_frequency", "0"]
    assert main([*common, "--amp", amp, "-max", "2", "--max_iters", "1"]) == 0
    assert main([*common, "--resume", "auto"]) == 0
    final = tmp_path / "SSD_HarDNet68_300" / "run" / "Final_SSD_HarDNet68_VOC.pth"
    assert load_checkpoint(final)["config"]["amp"] == amp
    assert main(["--test", str(final), "--device", "cuda", "--num_workers", "1"]) == 0
    # What a GPU wrote, a CPU reads.
    assert main(["--test", str(final), "--device", "cpu", "--num_workers", "0"]) == 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_a_group_of_one_process_changes_nothing(device):
    """What processes exchange by gloo and NCCL, in a group of one, which a job would leave out."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        world, where = World(0, 2), torch.device(device, 0)
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)).to(where)
        net = copy.deepcopy(plain)
        if device == "cuda":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        images = torch.randn(4, 3, 9, 9, device=where)
        for each in (plain, world.replicate(net, where)):
            loss = each(images).square().sum()
            loss.backward()
            assert torch.equal(world.sum(loss.detach().clone()), loss)
        world.share_statistics(net)
        for key, tensor in plain.state_dict().items():
            torch.testing.assert_close(net.state_dict()[key], tensor)
        for a, b in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)
        assert world.decide(lambda: {"a": [1]}) == {"a": [1]}
    finally:
        leave()
