"""utils/download.py and data/scripts/ against a local server."""

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.scripts import voc
from utils.download import Place, extract_tar, fetch, unpacking_mark
from utils.errors import UserError

ROOT = Path(__file__).parent.parent
CONTENT = bytes(range(256)) * 1600
PAGE = b"<!DOCTYPE html><html>quota exceeded</html>"


needs_filter = pytest.mark.skipif(not hasattr(tarfile, "data_filter"),
                                  reason="this Python cannot unpack safely, see utils.download")


@pytest.fixture(autouse=True)
def offered(server):
    server.files.update({"/a.bin": CONTENT, "/half.bin": CONTENT, "/page.bin": PAGE})


def md5(content: bytes) -> str:
    return f"md5:{hashlib.md5(content).hexdigest()}"


CHECKSUMS = [md5(CONTENT), f"sha256:{hashlib.sha256(CONTENT).hexdigest()[:8]}",
             f"git:{hashlib.sha1(b'blob 409600' + bytes(1) + CONTENT).hexdigest()}"]


@pytest.mark.parametrize("checksum", CHECKSUMS)
def test_a_file_arrives_once_in_a_new_folder_and_replaces_another(server, tmp_path, checksum):
    path = tmp_path / "new" / "ä.bin"
    for _ in range(2):
        assert fetch([Place(f"{server.base}/a.bin", checksum)], path) == path
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["ä.bin"]
    assert server.asked == ["/a.bin"]
    path.write_bytes(b"half")
    fetch([Place(f"{server.base}/a.bin", checksum)], path)
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(("url", "reason"), [
    ("/a.bin", hashlib.md5(CONTENT).hexdigest()), ("/half.bin", "204800 bytes that are not b.bin"),
    ("/page.bin", "web page"), ("/gone.bin", "404"), ("http://127.0.0.1:9/a.bin", "refused"),
    ("mirror/a.bin", "unknown url type")])
def test_a_bad_answer_leaves_the_earlier_file_and_says_what_to_do(server, tmp_path, url, reason):
    path = tmp_path / "b.bin"
    path.write_bytes(b"earlier")
    url = server.base + url if url.startswith("/") else url
    with pytest.raises(UserError) as caught:
        fetch([Place(url, md5(b"something else"))], path)
    message = str(caught.value)
    assert url in message and reason in message and f"by hand and put it at {path}" in message
    assert path.read_bytes() == b"earlier" and os.listdir(tmp_path) == ["b.bin"]


def test_a_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"Not a directory|File exists"):
        fetch([Place(f"{server.base}/a.bin", md5(CONTENT))], tmp_path / "file" / "a.bin")


def test_without_a_checksum_a_check_decides(server, tmp_path):
    def check(file: Path) -> str:
        return "" if file.read_bytes() == CONTENT else "wrong way round"

    places = [Place(f"{server.base}/a.bin", None)]
    server.files["/a.bin"] = CONTENT[::-1]
    with pytest.raises(UserError, match="wrong way round"):
        fetch(places, tmp_path / "a.bin", check)
    server.files["/a.bin"] = CONTENT
    assert fetch(places, tmp_path / "a.bin", check).read_bytes() == CONTENT
    with pytest.raises(ValueError, match="nothing would verify"):
        fetch(places, tmp_path / "a.bin")


def test_places_are_tried_in_order_and_a_file_of_any_is_kept(server, tmp_path):
    """Two places have different bytes of the same weights."""
    other, path = CONTENT[::-1], tmp_path / "a.bin"
    server.files["/b.bin"] = other
    names = {"gone": md5(CONTENT), "page": md5(CONTENT), "b": md5(other), "a": md5(CONTENT)}
    places = [Place(f"{server.base}/{name}.bin", each) for name, each in names.items()]
    assert fetch(places, path).read_bytes() == other
    assert server.asked == ["/gone.bin", "/page.bin", "/b.bin"]
    path.write_bytes(CONTENT)
    assert fetch(places, path).read_bytes() == CONTENT and len(server.asked) == 3
    with pytest.raises(UserError) as caught:
        fetch(places[:2], tmp_path / "c.bin")
    *table, last = str(caught.value).split("; ")
    assert last.endswith(f"by hand and put it at {tmp_path / 'c.bin'}") and len(table) == 2
    for line, place, reason in zip(table, places, ("404", "web page"), strict=False):
        assert place.url in line and reason in line


DRIVE = "https://drive.google.com/file/d/1IHX-vQ_z/view"


def test_files_of_drive_come_by_gdown_and_are_verified(tmp_path, monkeypatch):
    asked = []

    def download(url=None, output=None, quiet=False, use_cookies=True, id=None, resume=False):
        asked.append((id, use_cookies, resume))
        Path(output).write_bytes(CONTENT)
        return output

    monkeypatch.setitem(sys.modules, "gdown", SimpleNamespace(download=download))
    assert fetch([Place(DRIVE, md5(CONTENT))], tmp_path / "a.pth").read_bytes() == CONTENT
    assert asked == [("1IHX-vQ_z", False, True)]
    with pytest.raises(UserError, match=f"{DRIVE}: gave {len(CONTENT)} bytes that are not b.pth"):
        fetch([Place(DRIVE, md5(b"other"))], tmp_path / "b.pth")
    assert os.listdir(tmp_path) == ["a.pth"]


def refuse(**options):
    raise RuntimeError("\n\tToo many users have viewed the file.\n\tTry later.")


@pytest.mark.parametrize(("gdown", "reason"), [
    (None, "pip install gdown"),
    (SimpleNamespace(download=refuse), "Too many users have viewed the file. Try later."),
    (SimpleNamespace(download=lambda **options: None), "Google Drive refuses it")])
def test_what_drive_refuses_is_one_sentence(tmp_path, monkeypatch, gdown, reason):
    monkeypatch.setitem(sys.modules, "gdown", gdown)
    with pytest.raises(UserError) as caught:
        fetch([Place(DRIVE, md5(CONTENT))], tmp_path / "a.pth")
    message = str(caught.value)
    assert DRIVE in message and reason in message and "\n" not in message
    assert f"put it at {tmp_path / 'a.pth'}" in message
    assert os.listdir(tmp_path) == []


def test_files_of_hugging_face_come_by_their_package(tmp_path, monkeypatch):
    def download(repository, file, revision):
        assert (repository, file) == ("org/repo", "some/a.pth")
        cached = tmp_path / f"cached {revision}"
        cached.write_bytes(str(revision).encode())
        return str(cached)

    hub = SimpleNamespace(hf_hub_download=download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    for end, revision in (("", b"None"), ("@v1", b"v1")):
        place = Place(f"hf://org/repo/some/a.pth{end}", md5(revision))
        assert fetch([place], tmp_path / "a.pth").read_bytes() == revision
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"hf://org/repo/b\.pth.*pip install huggingface_hub"):
        fetch([Place("hf://org/repo/b.pth", md5(b""))], tmp_path / "b.pth")


def tar_of(files: dict[str, bytes]) -> bytes:
    """Return a tar of {name: content, or the TarInfo type of another member}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if content in tarfile.SUPPORTED_TYPES:
                info.type, info.linkname, content = content, "../../outside", b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@needs_filter
@pytest.mark.parametrize(("name", "content"), [
    ("../evil", b"evil"), ("a/../../evil", b"evil"), ("link", tarfile.SYMTYPE),
    ("hard", tarfile.LNKTYPE), ("device", tarfile.CHRTYPE), ("pipe", tarfile.FIFOTYPE)])
def test_a_dangerous_archive_is_refused_whole(tmp_path, name, content):
    archive = tmp_path / "in" / "bad.tar"
    archive.parent.mkdir()
    archive.write_bytes(tar_of({"good": b"good file", name: content}))
    with pytest.raises(UserError, match=rf"bad\.tar: refused .*{name}.* source you trust"):
        extract_tar(archive, tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"] and os.listdir(archive.parent) == ["bad.tar"]


@needs_filter
def test_an_archive_is_unpacked_over_what_is_there(tmp_path):
    archive, out = tmp_path / "a.tar", tmp_path / "out"
    archive.write_bytes(tar_of({"d": tarfile.DIRTYPE, "d/x": b"new x", "y": b"new y"}))
    (out / "d").mkdir(parents=True)
    (out / "d" / "x").write_bytes(b"an older x")
    (out / "d" / "z").write_bytes(b"z")
    extract_tar(archive, out)
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == {"d/x": b"new x", "d/z": b"z", "y": b"new y"}


def test_a_python_without_the_filter_says_which_one_has_it(tmp_path, monkeypatch):
    (tmp_path / "a.tar").write_bytes(tar_of({"x": b"x"}))
    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    with pytest.raises(UserError, match=r"a\.tar .*Python \d.*3\.10\.12"):
        extract_tar(tmp_path / "a.tar", tmp_path / "out")
    assert os.listdir(tmp_path) == ["a.tar"]


@needs_filter
@pytest.mark.parametrize("content", [b"", PAGE * 20, tar_of({"d/x": b"x" * 9999, "y": b""})[:5000]])
def test_what_is_no_whole_archive_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar is no whole tar archive .* get it again"):
        extract_tar(tmp_path / "a.tar", tmp_path / "out")


@needs_filter
def test_unpacking_without_room_leaves_its_mark(tmp_path):
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar_of({"d/x": b"x of d"}))
    (tmp_path / "d").write_bytes(b"a file where a folder must be")
    with pytest.raises(UserError, match=r"cannot unpack .*a\.tar into .* run again"):
        extract_tar(archive, tmp_path)
    assert unpacking_mark(archive, tmp_path).exists()


def voc_tar(image_set: str, ids: list[str]) -> bytes:
    top = "VOCdevkit/VOC2007"
    files = {f"{top}/ImageSets/Main/{image_set}.txt": "".join(f"{i}\n" for i in ids).encode()}
    for i in ids:
        files[f"{top}/Annotations/{i}.xml"] = b"<annotation/>"
        files[f"{top}/JPEGImages/{i}.jpg"] = b"\xff\xd8 image \xff\xd9"
    return tar_of(files)


@pytest.fixture
def mirror(server, monkeypatch):
    """The server as a mirror of small archives."""
    tars = (voc_tar("trainval", ["000005", "000007"]), voc_tar("test", ["000001"]))
    small = []
    for (image_set, name, *_), tar, count in zip(voc.ARCHIVES["2007"], tars, (2, 1), strict=True):
        server.files[f"/voc2007/{name}"] = tar
        small.append((image_set, name, md5(tar)[4:], count))
    monkeypatch.setitem(voc.ARCHIVES, "2007", tuple(small))
    server.args = ["2007", "--url-base", server.base + "/"]
    return server


@needs_filter
def test_voc_is_fetched_once_and_unpacked(mirror, tmp_path, capsys):
    for _ in range(2):
        assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 0
        for archive in tmp_path.glob("*.tar"):
            archive.unlink()
    year_dir = tmp_path / "VOCdevkit" / "VOC2007"
    assert sorted(os.listdir(year_dir / "JPEGImages")) == ["000001.jpg", "000005.jpg", "000007.jpg"]
    assert (year_dir / "ImageSets" / "Main" / "trainval.txt").read_text() == "000005\n000007\n"
    out = capsys.readouterr().out
    assert "trainval is already complete, 2 " in out and "test is already complete, 1 " in out
    assert len(mirror.asked) == 2


@needs_filter
@pytest.mark.parametrize(
    ("file", "content"),
    [("JPEGImages/000005.jpg", None), ("Annotations/000005.xml", b""),
     ("JPEGImages/000005.jpg", b"half"), ("ImageSets/Main/trainval.txt", b"000005\n")])
def test_voc_that_is_not_complete_is_unpacked_again(mirror, tmp_path, file, content):
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 0
    year_dir = tmp_path / "VOCdevkit" / "VOC2007"
    damaged = year_dir / file
    whole = damaged.read_bytes()
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    if content == b"half":  # only the mark tells that the work was cut short
        unpacking_mark(tmp_path / "VOCtrainval_06-Nov-2007.tar", tmp_path).touch()
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 0
    assert damaged.read_bytes() == whole
    assert voc.count_complete(year_dir, "trainval") == 2
    assert len(mirror.asked) == 2  # the archives were still there
    assert not list(tmp_path.glob(".*"))


@needs_filter
def test_an_archive_that_lacks_images_is_named(mirror, tmp_path, capsys, monkeypatch):
    image_set, name, checksum, _ = voc.ARCHIVES["2007"][0]
    monkeypatch.setitem(voc.ARCHIVES, "2007", ((image_set, name, checksum, 3),))
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert name in error and "3 images" in error and "trainval; " in error
    assert "run again" in error


def test_voc_counts_are_the_official_ones():
    counts = {year: [row[-1] for row in rows] for year, rows in voc.ARCHIVES.items()}
    assert counts == {"2007": [5011, 4952], "2012": [11540]}


def test_voc_shell_scripts_work_from_any_folder(tmp_path):
    """Even beside folders of the names that the project's have."""
    first, script = (ROOT / "data" / "scripts" / f"VOC{year}.sh" for year in (2007, 2012))
    lines, first_lines = (file.read_text().splitlines()[2:] for file in (script, first))
    assert [line.replace("2007", "2012") for line in first_lines] == lines
    (tmp_path / "utils").mkdir()
    (tmp_path / "utils" / "__init__.py").write_text("raise SystemExit('a stranger')\n")
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\necho "$@"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": os.pathsep.join([str(tmp_path), os.environ["PATH"]])}
    command = [script, "--root", "x", "--url-base", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{ROOT}/data/scripts/voc.py 2012 --root x --url-base nowhere\n"
    assert done.returncode == 2 and "unknown url type: 'nowhere/" in done.stderr
