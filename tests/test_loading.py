"""From a data set to batches: order, shares, loading processes and what goes wrong in them."""

import gc
import itertools
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from data import loading
from data.loading import (
    EpochSampler,
    TestSet,
    TrainingSet,
    check_shared_memory,
    detection_collate,
    training_loader,
)
from data.transforms import SSDAugmentation
from data.voc0712 import VOCDetection
from utils.errors import UserError


@pytest.fixture
def dataset(voc_folder):
    return VOCDetection(voc_folder, [(None, "trainval")])


def make_loader(dataset, workers, batch_size=2, seed=3, **division):
    sampler = EpochSampler(len(dataset), batch_size, seed, **division)
    return training_loader(TrainingSet(dataset, SSDAugmentation(300), seed), sampler, workers,
                           False)


def epochs_of(loader, epochs):
    found = []
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch, 0)
        found += list(loader)
    return found


def assert_same_batches(ours, theirs):
    for (a, ta, ia), (b, tb, ib) in zip(ours, theirs, strict=True):
        assert ia == ib
        assert torch.equal(a, b)
        assert all(torch.equal(x, y) for x, y in zip(ta, tb, strict=True))


def test_collate_puts_channels_first_and_keeps_an_image_without_boxes():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 5, 3), np.uint8)
    targets = [np.zeros((0, 5), np.float32), np.ones((2, 5), np.float32)]
    stacked, boxes = detection_collate(list(zip(images, targets, strict=True)))
    assert np.array_equal(stacked, images.transpose(0, 3, 1, 2)) and stacked.dtype == torch.uint8
    assert [b.shape for b in boxes] == [(0, 5), (2, 5)]
    tensors = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    assert torch.equal(detection_collate([(image,) for image in tensors])[0], stacked)


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_of_a_loader_is_the_collated_samples(dataset, workers):
    samples = TrainingSet(dataset, SSDAugmentation(300), 3)
    (images, targets, indices), *_ = make_loader(dataset, workers, batch_size=3)
    assert any(len(target) == 0 for target in targets) or len(dataset.target(2)) == 0
    expected = detection_collate([samples[0, i] for i in indices])
    assert_same_batches([(images, targets, indices)], [expected])
    # One tensor was sent for all of them: each takes an open file in both processes.
    assert len({target.untyped_storage().data_ptr() for target in targets}) == 1


def test_sample_is_the_item_of_the_data_set_augmented_by_seed_epoch_and_index(dataset):
    augment = SSDAugmentation(300)
    for seed, epoch in ((7, 4), (7, 5), (8, 4)):
        image, target, index = TrainingSet(dataset, augment, seed)[epoch, 1]
        expected = augment(*dataset[1], np.random.default_rng((seed, epoch, 1)))
        assert np.array_equal(image, expected[0]) and np.array_equal(target, expected[1])
        assert index == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_test_batches_of_all_processes_are_the_data_set(dataset, workers):
    samples = TestSet(dataset, 300)
    found = {}
    for rank in range(4):  # of 6 images: two processes have one
        share = Subset(samples, range(rank, len(samples), 4))
        batches = list(loading.Loader(share, workers, pin_memory=False, batch_size=2))
        images = [image for images, _ in batches for image in images]
        assert [size.tolist() for _, sizes in batches for size in sizes] == [[96, 72]] * len(images)
        found |= dict(zip(range(rank, len(samples), 4), images, strict=True))
    assert sorted(found) == list(range(6))
    for index, image in found.items():
        np.testing.assert_array_equal(image.permute(1, 2, 0), samples[index][0])


def test_every_epoch_shuffles_anew_and_leaves_the_small_rest_out():
    sampler = EpochSampler(10, 3, seed=5)
    first, again = list(sampler), list(sampler)
    assert first == again and [len(batch) for batch in first] == [3, 3, 3]
    used = [index for batch in first for _, index in batch]
    assert len(set(used)) == 9
    sampler.set_epoch(1, 0)
    second = list(sampler)
    assert [i for b in second for _, i in b] != used
    assert {epoch for batch in second for epoch, _ in batch} == {1}
    sampler.set_epoch(1, 2)  # where an interrupted epoch stopped
    assert list(sampler) == second[2:]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_the_same_however_it_is_divided(world, accumulate):
    order = np.random.default_rng((5, 3)).permutation(50).tolist()
    samplers = [EpochSampler(50, 16, 5, rank, world, accumulate) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(3, 1)
        assert sampler.steps == 3 and len(sampler) == 3 * accumulate
        assert sampler.batch(2) == order[32:48]
    batches = [list(sampler) for sampler in samplers]
    for step in (1, 2):
        found = []
        for micro, rank in itertools.product(range(accumulate), range(world)):
            part = batches[rank][(step - 1) * accumulate + micro]
            assert len(part) == 16 // (world * accumulate)
            found += part
        assert found == [(3, i) for i in order[16 * step : 16 * step + 16]]


def test_only_batch_is_shortened_to_equal_parts():
    assert [len(batch) for batch in EpochSampler(2, 32, seed=0)] == [2]
    samplers = [EpochSampler(11, 32, 0, rank, 2, 2) for rank in range(2)]
    assert [[len(part) for part in sampler] for sampler in samplers] == [[2, 2], [2, 2]]
    assert samplers[0].batch(0) == np.random.default_rng((0, 0)).permutation(11)[:8].tolist()


def test_batch_that_cannot_be_divided_is_refused():
    with pytest.raises(ValueError, match="batch of 30 is no multiple of 4 parts"):
        EpochSampler(100, 30, 0, world=2, accumulate=2)
    with pytest.raises(ValueError, match="3 images are fewer than the 4 parts"):
        EpochSampler(3, 32, 0, world=4)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_loading_processes_do_not_grow_over_the_epochs(dataset):
    loader = make_loader(dataset, 2)

    def resident():
        processes = multiprocessing.active_children()
        assert len(processes) == 2
        pages = [int(Path(f"/proc/{p.pid}/statm").read_text().split()[1]) for p in processes]
        return np.array(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20

    assert not multiprocessing.active_children()
    epochs_of(loader, range(5))
    first = resident()
    epochs_of(loader, range(5, 35))
    # Were each of the 90 samples of a process kept, it would hold 23 MiB more.
    assert (resident() - first < 8).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_image_that_vanishes_is_told_in_the_readers_sentence_alone(dataset, workers):
    loader = make_loader(dataset, workers, batch_size=1)
    path, told = dataset.image_path(4), ""
    others = multiprocessing.active_children()
    gc.collect()
    gc.disable()
    try:
        for epoch in range(2):
            loader.batch_sampler.set_epoch(epoch, 0)
            for _ in loader:
                path.unlink(missing_ok=True)
    except UserError as error:
        told = str(error)
    assert told.startswith(f"{path}: cannot read the image (No such file or directory); copy it")
    assert len(set(multiprocessing.active_children()) - set(others)) == workers
    # Left to the garbage collector, each would take PyTorch 5 seconds to end.
    del loader
    ended = not set(multiprocessing.active_children()) - set(others)
    gc.enable()
    assert ended


@pytest.mark.parametrize("workers", [0, 1])
def test_error_in_the_program_stays_what_it_is(dataset, workers):
    dataset.pull_image = lambda index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(make_loader(dataset, workers))


DYING = """
import itertools, multiprocessing, os, signal, sys, time
from data.loading import EpochSampler, TrainingSet, training_loader
from data.transforms import SSDAugmentation
from data.voc0712 import VOCDetection

dataset = VOCDetection(sys.argv[1], [(None, "trainval")])
samples = TrainingSet(dataset, SSDAugmentation(300), 0)
loader = training_loader(samples, EpochSampler(6, 1, 0), 2, False)
try:
    for step, _ in enumerate(itertools.chain(loader, loader)):
        if step == int(sys.argv[2]):
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
            time.sleep(1)
            print("the step was not disturbed", flush=True)
except Exception as error:
    print(f"{type(error).__name__} from {type(error.__cause__).__name__}: {error}")
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.parametrize("step", [0, 5])  # 5: the last of an epoch
def test_killed_loading_process_is_told_with_the_fix_when_the_next_batch_is_due(voc_folder, step):
    done = subprocess.run([sys.executable, "-c", DYING, voc_folder, str(step)],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True,
                          timeout=120)
    undisturbed, error = done.stdout.splitlines()
    assert undisturbed == "the step was not disturbed"
    assert error.startswith("WorkerDied from RuntimeError: a loading process died (SIGKILL)")
    assert "--num_workers" in error and "--shm-size" in error
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 2])
def test_pinned_batches_are_the_same(dataset, workers):
    sampler = EpochSampler(len(dataset), 2, 3)
    samples = TrainingSet(dataset, SSDAugmentation(300), 3)
    pinned = list(training_loader(samples, sampler, workers, pin_memory=True))
    assert_same_batches(pinned, list(make_loader(dataset, 0)))
    for images, targets, _ in pinned:
        assert images.is_pinned()
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert all(target.is_pinned() for target in targets)


def set_free(monkeypatch, mebibytes):
    usage = type("Usage", (), {"free": mebibytes * 2**20})
    monkeypatch.setattr(loading.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(loading.os.path, "isdir", lambda path: True)


def test_batches_under_way_must_fit_into_shared_memory(monkeypatch):
    # A batch of 32 images of 512 x 512 takes 24 MiB; 2 processes have 2 each, one is in use.
    set_free(monkeypatch, 120)
    check_shared_memory(2, 32, 512)
    set_free(monkeypatch, 119)
    with pytest.raises(UserError, match=r"--num_workers 2 needs 120 MiB .* has 119 MiB free; give "
                       "--num_workers 1, .*--shm-size=1g"):  # fmt: skip
        check_shared_memory(2, 32, 512)
    with pytest.raises(UserError, match=r"needs 480 MiB .* give --num_workers 0,"):
        check_shared_memory(2, 32, 512, processes=4)
    set_free(monkeypatch, 0)
    check_shared_memory(0, 32, 512)
    monkeypatch.setattr(loading.os.path, "isdir", lambda path: False)
    check_shared_memory(8, 32, 512)
