"""Array files, and what is made of damaged ones."""

import json
import os

import numpy as np
import pytest

from data.curves import load_curves, write_curves
from data.detections import load_detections, save_detections
from utils.errors import UserError
from utils.files import load_arrays, write_json


def test_arrays_are_read_and_nothing_else_is(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(3), y=np.array("text"))
    arrays = load_arrays(path)
    assert list(arrays) == ["x", "y"] and arrays["x"].tolist() == [0, 1, 2]
    with pytest.raises(OSError, match="none.npz"):
        load_arrays(tmp_path / "none.npz")
    np.savez(path, x=np.array([{}], object))
    with pytest.raises(ValueError, match="allow_pickle"):
        load_arrays(path)
    np.save(path.open("wb"), np.ones(3))
    with pytest.raises(ValueError, match="."):
        load_arrays(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="No data left"):
        load_arrays(path)


def test_json_holds_every_name_and_text_as_it_is(tmp_path):
    path, value = tmp_path / "a.json", {"é漢😀": ["\n", 1.5, None]}
    write_json(path, value)
    assert path.read_bytes() == '{\n "é漢😀": [\n  "\\n",\n  1.5,\n  null\n ]\n}\n'.encode()
    value = {os.fsdecode(b"a\xff"): "\ud800é"}  # a name that is not UTF-8, and half a character
    write_json(path, value)
    assert json.loads(path.read_bytes().decode("utf-8")) == value
    assert "\\ud800é" in path.read_text("utf-8")


def keep_curves(path):
    counts, points = np.array([[[1, 0, 1, 0]]]), np.ones(2)
    columns = {"recall": points, "precision": points, "scores": points}
    write_curves(path, ["dog"], [0.5], counts=counts, **columns)


def keep_detections(path):
    found = {"boxes": np.ones((2, 4)), "scores": np.ones(2), "labels": np.ones(2)}
    save_detections(path, ["a"], [found], {"sets": "test"})


@pytest.mark.parametrize(
    ("keep", "load"),
    [
        (keep_curves, lambda path: load_curves(path).curve("dog")),
        (keep_detections, lambda path: load_detections(path, ["a"], {"sets": "test"})),
    ],
)
def test_file_with_a_byte_flipped_is_refused_by_name_or_read(tmp_path, keep, load):
    path, rng = tmp_path / "a.npz", np.random.default_rng(0)
    keep(path)
    load(path)
    whole, refused = np.fromfile(path, np.uint8), 0
    for place in rng.integers(0, len(whole), 500):
        damaged = whole.copy()
        damaged[place] ^= rng.choice([1, 2, 8, 128, 255])
        damaged.tofile(path)
        try:
            load(path)
        except UserError as error:
            assert str(path) in str(error)
            refused += 1
    assert 250 < refused
