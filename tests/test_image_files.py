"""Finding image and annotation files by name."""

import os
import unicodedata

import pytest

from data import find_layout
from data.image_files import FileIndex
from utils.errors import UserError

NFC, NFD = (unicodedata.normalize(form, "été") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("stored", "stem", "name"), [
    ("a.JPG", "a", "a.JPG"), ("x_jpg.rf.0a1.jpg", "x_jpg.rf.0a1", "x_jpg.rf.0a1.jpg"),
    (f"{NFD}.jpg", NFC, f"{NFC}.jpg"), (f"{NFC}.jpg", NFD, f"{NFD}.jpg"),
    (f"{NFD}/{NFD}.jpg", f"{NFC}/{NFC}", f"{NFC}/{NFC}.jpg"), ("b/a.jpg", "b\\a", "b\\a.jpg"),
])
def test_file_is_found_across_unicode_forms_and_back_slashes(tmp_path, stored, stem, name):
    path = tmp_path / stored
    path.parent.mkdir(exist_ok=True)
    path.touch()
    index = FileIndex((".jpg",))
    assert index.by_stem(tmp_path / stem) == [path] and index.by_name(tmp_path / name) == path


def test_files_of_one_stem_come_in_order_of_preference_and_equal_forms_first(tmp_path):
    for name in (f"{NFD}.jpg", f"{NFC}.jpg", "a.png", "a.JPG", "a.jpg", "a.xml"):
        (tmp_path / name).touch()
    (tmp_path / "a.jpeg").mkdir()
    index = FileIndex((".jpg", ".jpeg", ".png"))
    assert [path.name for path in index.by_stem(tmp_path / "a")] == ["a.JPG", "a.jpg", "a.png"]
    assert index.by_name(tmp_path / "a.xml") == tmp_path / "a.xml"
    for form in (NFC, NFD):
        assert index.by_stem(tmp_path / form) == [tmp_path / f"{form}.jpg"]


@pytest.mark.parametrize("name", ["gone", "gone/a", "nul\0", "\ud800", "n" * 300 + "/a", "a.jpg/a"])
def test_name_of_no_file_finds_nothing(tmp_path, name):
    (tmp_path / "a.jpg").touch()
    index = FileIndex((".jpg",))
    assert index.by_stem(tmp_path / name) == [] and index.by_name(tmp_path / name) is None


def test_all_files_under_a_folder_are_listed_once_and_in_order(tmp_path):
    for name in ("b/2.jpg", f"b/{NFD}/1.jpg", "a.jpg", ".hidden/a.jpg", "b/.a.jpg", "c/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    os.symlink(tmp_path / "nowhere", tmp_path / "b" / "broken")
    found = FileIndex((".jpg",)).inside(tmp_path)
    names = ["a.jpg", "b/2.jpg", f"b/{NFD}/1.jpg"]
    assert [path.relative_to(tmp_path).as_posix() for path in found] == names


def test_a_search_through_a_whole_disk_ends_with_what_was_searched(tmp_path, monkeypatch):
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.setattr("data.image_files.MOST_FOLDERS", 3)
    assert not FileIndex((".jpg",)).holds_files(tmp_path)
    monkeypatch.setattr("data.image_files.MOST_FOLDERS", 2)
    with pytest.raises(UserError, match=rf"{tmp_path} .*2 folders.*{tmp_path}/a/b;.*--root"):
        find_layout(tmp_path)
