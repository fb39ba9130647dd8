"""Caches of decoded images: the same samples, without decoding twice, and never too large."""

import multiprocessing
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data import cache as cache_module
from data.cache import DiskCache, MemoryCache, free_memory, open_cache
from data.loading import EpochSampler, TrainingSet, training_loader
from data.transforms import SSDAugmentation
from data.voc0712 import VOCDetection
from utils.errors import UserError

ROOT = Path(__file__).parent.parent

KILLED = """
import os, signal, sys
import numpy as np
from pathlib import Path
from data import cache
cache.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
cache._write(Path(sys.argv[1]), np.zeros(9))
"""


@pytest.fixture
def dataset(voc_folder):
    return VOCDetection(voc_folder, [(None, "trainval")])


@pytest.fixture(params=["memory", "folder"])
def where(request, tmp_path):
    return "memory" if request.param == "memory" else str(tmp_path / "new" / "cache")


@pytest.fixture
def start_method():
    before = multiprocessing.get_start_method()
    yield lambda name: multiprocessing.set_start_method(name, force=True)
    multiprocessing.set_start_method(before, force=True)


def two_epochs(dataset, pull, workers=0, between=lambda: None):
    samples = TrainingSet(dataset, SSDAugmentation(300), 3, pull)
    loader = training_loader(samples, EpochSampler(len(dataset), 2, 3), workers, False)
    first = list(loader)
    between()
    loader.batch_sampler.set_epoch(1, 0)
    return first + list(loader)


@pytest.mark.parametrize("method", [None, "fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_samples_are_the_same_and_no_image_is_decoded_twice(dataset, where, method, start_method):
    if method not in (None, *multiprocessing.get_all_start_methods()):
        pytest.skip(f"no {method} here")
    expected = two_epochs(dataset, None)

    def remove():
        for index in range(len(dataset)):
            dataset.image_path(index).unlink()

    if method:
        start_method(method)
    pull, workers = open_cache(where, dataset), 2 if method else 0
    for ours, theirs in zip(two_epochs(dataset, pull, workers, remove), expected, strict=True):
        assert ours[2] == theirs[2] and torch.equal(ours[0], theirs[0])
        assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
    assert open_cache("off", dataset) is None


def test_cached_image_equals_the_decoded_one_and_cannot_be_written_to(dataset, where):
    pull = open_cache(where, dataset)
    for _ in range(2):
        for index in (3, 0):
            np.testing.assert_array_equal(pull(index), dataset.pull_image(index))
    assert pull(3).dtype == np.uint8
    with pytest.raises(ValueError, match="read-only"):
        pull(3)[0] = 0


def test_image_of_another_size_than_annotated_is_not_kept(dataset, where, tmp_path):
    path = dataset.image_path(1)
    image = cv2.copyMakeBorder(dataset.pull_image(1), 0, 1, 0, 1, cv2.BORDER_REPLICATE)
    cv2.imwrite(str(path), image)  # one pixel more is accepted as rounding
    pull = open_cache(where, dataset)
    for _ in range(2):
        np.testing.assert_array_equal(pull(1), dataset.pull_image(1))
    assert pull(1).shape == (73, 97, 3)
    path.unlink()
    with pytest.raises(UserError, match="b2.jpg: cannot read"):
        pull(1)


@pytest.mark.parametrize("processes", [1, 8])
def test_images_that_do_not_fit_into_memory_are_refused(dataset, monkeypatch, processes):
    """All processes of a machine have a block each, and the first of them counts them all."""
    need = processes * 6 * 96 * 72 * 3  # of one process: 124,416 bytes are 80 % of 155,520
    monkeypatch.setattr(cache_module, "free_memory", lambda: need / 0.8 + 1)
    open_cache("memory", dataset, processes)
    monkeypatch.setattr(cache_module, "free_memory", lambda: need / 0.8 - 1)
    free = "0.00124 GB" if processes > 1 else "0.000156 GB"
    with pytest.raises(UserError, match=f"memory needs 0.000124 GB .* 80% of the {free} .*--cache"):
        open_cache("memory", dataset, processes)


def test_memory_that_goes_to_another_process_meanwhile_is_told(dataset, monkeypatch):
    def share_memory(tensor):
        raise RuntimeError("unable to resize file: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share_memory)
    with pytest.raises(UserError, match="--cache memory needs"):
        MemoryCache(dataset)


def test_free_memory_is_the_least_of_the_systems_the_shared_and_the_containers(monkeypatch):
    files = {"/proc/meminfo": ["MemTotal:  900 kB", "MemAvailable:  500 kB"]}
    monkeypatch.setattr(cache_module, "_lines", lambda path: files.get(str(path), []))
    monkeypatch.setattr(cache_module.os.path, "isdir", lambda path: True)
    usage = type("Usage", (), {"free": 600 * 1024})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    assert free_memory() == 500 * 1024
    usage.free = 400 * 1024
    assert free_memory() == 400 * 1024
    group = "/sys/fs/cgroup/memory"
    files |= {f"{group}.max": ["max"], f"{group}.current": ["300000"]}
    assert free_memory() == 400 * 1024
    # File pages that nobody used lately count as used, but are given up first.
    files |= {f"{group}.max": ["500000"], f"{group}.stat": ["anon 1", "inactive_file 70000"]}
    assert free_memory() == 270000


def test_folder_serves_the_next_run_and_follows_a_changed_image(dataset, tmp_path, monkeypatch):
    before = [*map(DiskCache(dataset, tmp_path / "cache"), range(6))]
    path = dataset.image_path(2)
    cv2.imwrite(str(path), 255 - before[2])
    decoded = []
    pull_image = dataset.pull_image
    monkeypatch.setattr(dataset, "pull_image", lambda i: decoded.append(i) or pull_image(i))
    again = DiskCache(dataset, tmp_path / "cache")
    for index in range(6):
        assert np.array_equal(again(index), before[index]) == (index != 2)
    assert decoded == [2]
    assert len(list((tmp_path / "cache").iterdir())) == 7


def test_file_is_numpys_own_and_a_damaged_one_is_written_anew(dataset, tmp_path):
    pull = DiskCache(dataset, tmp_path / "cache")
    pull(0)
    (path,) = (tmp_path / "cache").iterdir()
    np.save(tmp_path / "own.npy", dataset.pull_image(0))
    whole = (tmp_path / "own.npy").read_bytes()
    for damaged in (whole, b"", whole[:40], whole[:-1], whole[:8] + b"xxxxx" + whole[13:],
                    whole.replace(b"(72, 96, 3)", b"(96, 72, 3)"), b"PK\3\4" + whole[4:]):
        path.write_bytes(damaged)
        np.testing.assert_array_equal(pull(0), dataset.pull_image(0))
        assert path.read_bytes() == whole


def test_half_file_of_a_killed_process_is_deleted_by_the_next_run(dataset, tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "a.npy"], cwd=ROOT, check=False)
    assert len(list(tmp_path.glob(".*.part"))) == 1
    DiskCache(dataset, tmp_path)
    assert not list(tmp_path.glob(".*.part"))


def test_images_that_do_not_fit_on_the_disk_are_refused(dataset, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    pull = DiskCache(dataset, folder)
    pull(0), pull(1)
    size = next(folder.iterdir()).stat().st_size
    usage = type("Usage", (), {"free": 4 * size})
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda path: usage)
    DiskCache(dataset, folder)  # two of six are there
    usage.free -= 1
    with pytest.raises(UserError, match=f"{folder} needs 8.35e-05 GB for 4 .* 8.35e-05 GB free"):
        DiskCache(dataset, folder)


def test_folder_that_cannot_be_made_and_a_missing_image_are_told_at_the_start(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--cache .*file/cache: Not a directory; give another"):
        DiskCache(dataset, tmp_path / "file" / "cache")
    path = dataset.image_path(5)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: cannot read .*No such file"):
        DiskCache(dataset, tmp_path / "cache")


def test_full_disk_ends_in_a_sentence_and_leaves_no_half_file(dataset, tmp_path):
    resource = pytest.importorskip("resource")
    pull = DiskCache(dataset, tmp_path / "cache")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"\.npy: cannot write .*room"):
            pull(0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "cache").iterdir())
    np.testing.assert_array_equal(pull(0), dataset.pull_image(0))
