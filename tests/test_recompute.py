"""Recomputed concatenations: the same gradients to the last bit, out of less memory."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile

from benchmarks.train import allocated, kept
from models import build_net
from models.base import concatenate, recompute_concatenations
from utils.device import autocast

CPU = torch.device("cpu")


def training_net(version, classes=3):
    torch.manual_seed(0)
    return build_net(version, 300, classes).train().to(memory_format=torch.channels_last)


def random_images(batch):
    images = torch.randn(batch, 3, 300, 300, generator=torch.Generator().manual_seed(1)) * 50
    return images.contiguous(memory_format=torch.channels_last)


def results(net, images, amp="off"):
    """Outputs and gradients of a training step."""
    net.zero_grad()
    with autocast(CPU, amp):
        outputs = net(images)
    sum(x.float().square().mean() for x in outputs).backward()
    return [*outputs, *(p.grad for p in net.parameters())]


@pytest.mark.parametrize(
    ("version", "amp"),
    [("SSD_HarDNet68", "off"), ("SSD_HarDNet68", "bf16"), ("SSD_HarDNet68ds", "off"),
     pytest.param("SSD_HarDNet85", "off", marks=pytest.mark.slow),
     pytest.param("SSD_HarDNet68ds", "bf16", marks=pytest.mark.slow),
     pytest.param("RFB_HarDNet68", "bf16", marks=pytest.mark.slow)],
)
def test_gradients_are_the_same_bit_by_bit_and_less_is_kept(version, amp):
    net, images = training_net(version), random_images(1)
    assert not net.recompute
    expected, plain = results(net, images, amp), kept(net, images, amp)
    names = list(net.state_dict())
    net.recompute = True
    assert list(net.state_dict()) == names
    assert all(map(torch.equal, results(net, images, amp), expected))
    # In bfloat16 it includes copies of the weights, which do not grow with the batch.
    assert kept(net, images, amp) < (0.87 if amp == "bf16" else 0.83) * plain


def test_hardnet_keeps_a_quarter_less_per_image_in_bfloat16():
    net, images = training_net("SSD_HarDNet68"), random_images(2)
    sizes = []
    for net.recompute in (False, True):
        sizes.append(kept(net, images, "bf16") - kept(net, images[:1], "bf16"))
    assert sizes[1] < 0.75 * sizes[0]


def test_networks_without_dense_blocks_keep_the_same():
    net, images = training_net("SSD_vgg"), random_images(1)
    plain = kept(net, images, "off")
    net.recompute = True
    assert kept(net, images, "off") == plain


def test_what_is_kept_is_what_autograd_saves():
    net, images = training_net("SSD_HarDNet68"), random_images(1)
    there = {t.untyped_storage().data_ptr() for t in (*net.state_dict().values(), images)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = net(images)
    expected = sum(saved.values()) + sum(x.nbytes for x in outputs)
    assert kept(net, images, "off") == pytest.approx(expected, rel=0.01)


def test_nothing_stays_of_a_forward_pass_that_no_backward_pass_follows():
    net, images = training_net("SSD_HarDNet68"), random_images(1)
    net.recompute = True
    with profile(profile_memory=True) as memory:
        outputs = net(images)
        del outputs
    assert allocated(memory) == 0


def test_without_gradients_nothing_changes():
    net, images = training_net("SSD_HarDNet68").eval(), random_images(1)
    with torch.no_grad():
        expected = net(images)
        net.recompute = True
        with profile(profile_memory=True) as memory:
            measured = net(images)
    assert all(map(torch.equal, measured, expected))
    assert allocated(memory) == sum(x.nbytes for x in measured)


def test_replica_of_several_processes_recomputes(tmp_path):
    net, images = training_net("SSD_HarDNet68"), random_images(1)
    expected = results(net, images)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0,
                                         world_size=1)
    try:
        replica = nn.parallel.DistributedDataParallel(net)
        net.recompute = True
        assert all(map(torch.equal, results(replica, images), expected))
        kept(replica, images, "off")  # the replica makes its buffers anew after the first step
        net.recompute = False
        plain = kept(replica, images, "off")
        net.recompute = True
        assert kept(replica, images, "off") < 0.83 * plain
    finally:
        torch.distributed.destroy_process_group()


def test_parts_are_kept_in_place_of_their_concatenation_alone():
    parts = [torch.randn(1, n, 4, 4, requires_grad=True) for n in (2, 3)]
    other = torch.randn(1, 5, 4, 4, requires_grad=True)
    with profile(profile_memory=True) as memory, recompute_concatenations():
        whole = concatenate(parts)
        loss = (whole * whole.detach().clone()).sum() + (other + other).square().sum()
        assert torch.equal(whole, torch.cat(parts, 1))
        del whole
    float32 = 4
    # The clone, other + other and the loss; not the concatenation.
    assert allocated(memory) == float32 * (2 * 5 * 16 + 1)
    loss.backward()
    for part in parts:
        torch.testing.assert_close(part.grad, part.detach())
    torch.testing.assert_close(other.grad, 8 * other.detach())


def test_memory_of_a_dead_concatenation_is_not_mistaken_for_it():
    weight = torch.randn(1, 4, 8, 8, requires_grad=True)
    with recompute_concatenations():
        for value in range(20):
            with torch.no_grad():
                concatenate([torch.full((1, 2, 8, 8), -1.0)] * 2)
            # Likely at the address of the last one.
            same_shape = torch.full((1, 4, 8, 8), float(value))
            (gradient,) = torch.autograd.grad((weight * same_shape).sum(), weight)
            assert torch.equal(gradient, same_shape)


def test_a_concatenation_outside_is_an_ordinary_one():
    with recompute_concatenations():
        pass
    part = torch.randn(1, 2, 4, 4, requires_grad=True)
    whole = concatenate([part, part])
    with profile(profile_memory=True) as memory:
        loss = (whole * whole.detach().clone()).sum()
        del loss
    assert allocated(memory) == 0
