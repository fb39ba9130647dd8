"""utils/download.py and data/scripts/ against a local server that misbehaves on request."""

import errno
import hashlib
import http.server
import io
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import types

import pytest

from data.scripts import voc
from utils import download
from utils.download import extract_tar, fetch, unpacking_mark
from utils.errors import UserError

REPO = pathlib.Path(__file__).resolve().parents[1]
CONTENT = bytes(range(256)) * 1600  # 409,600 bytes, several chunks


def md5(content):
    return f"md5:{hashlib.md5(content).hexdigest()}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        server.log.append((self.path, asked))
        behaviour = server.behaviours.pop(0) if server.behaviours else ""
        content = server.files.get(self.path)
        if behaviour == "web page":
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            return self.wfile.write(b"<html>moved</html>")
        if behaviour.isdigit():
            return self.send_error(int(behaviour))
        if content is None:
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if behaviour == "ignore range":
            start = 0
        if start and start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            first = start + 1 if behaviour == "wrong range" else start
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if behaviour != "no length":
            self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        body = content[start:]
        self.wfile.write(body[: len(body) // 2] if behaviour in ("truncate", "stall") else body)
        if behaviour == "stall":
            server.released.wait(10)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.behaviours, server.log = {"/a.bin": CONTENT}, [], []
        server.released = threading.Event()
        server.base = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.released.set()
        server.shutdown()
        thread.join()


def get(server, path, content=CONTENT, **options):
    return fetch(f"{server.base}/a.bin", path, md5(content), backoff=0, **options)


def part_of(path):
    return path.with_name(path.name + ".part")


def test_file_arrives_whole_in_a_new_folder_and_leaves_no_part(server, tmp_path):
    path = tmp_path / "new" / "ä.bin"
    assert get(server, path) == path
    assert path.read_bytes() == CONTENT
    assert os.listdir(path.parent) == ["ä.bin"]
    assert server.log == [("/a.bin", None)]


def test_existing_good_file_is_not_fetched_again(server, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(CONTENT)
    get(server, path)
    assert server.log == []


def test_existing_bad_file_is_replaced(server, tmp_path, capsys):
    path = tmp_path / "a.bin"
    path.write_bytes(b"half")
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert f"{path} is not the file wanted (it has the md5" in capsys.readouterr().err


@pytest.mark.parametrize("behaviour", ["truncate", "stall"])
def test_cut_transfer_goes_on_from_its_last_byte(server, tmp_path, behaviour):
    server.behaviours = [behaviour]
    get(server, tmp_path / "a.bin", timeout=0.3)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    (_, first), (_, second) = server.log
    start = int(re.fullmatch(r"bytes=(\d+)-", second)[1])
    assert first is None and len(CONTENT) // 2 - download.CHUNK <= start <= len(CONTENT) // 2 > 0


def test_part_of_an_earlier_run_is_continued(server, tmp_path):
    path = tmp_path / "a.bin"
    part_of(path).write_bytes(CONTENT[:1000])
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert server.log == [("/a.bin", "bytes=1000-")]


@pytest.mark.parametrize("behaviour", ["ignore range", "wrong range"])
def test_server_without_usable_ranges_means_starting_over(server, tmp_path, behaviour):
    path = tmp_path / "a.bin"
    part_of(path).write_bytes(CONTENT[:1000])
    server.behaviours = [behaviour]
    get(server, path)
    assert path.read_bytes() == CONTENT


def test_complete_part_is_only_renamed(server, tmp_path):
    path = tmp_path / "a.bin"
    part_of(path).write_bytes(CONTENT)
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert len(server.log) == 1


@pytest.mark.parametrize("stale", [b"x" * 1000, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 1)])
def test_part_of_another_file_costs_one_new_start(server, tmp_path, stale):
    path = tmp_path / "a.bin"
    part_of(path).write_bytes(stale)
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert [asked for _, asked in server.log] == [f"bytes={len(stale)}-", None]


def test_transfer_without_a_length_is_judged_by_its_checksum(server, tmp_path):
    server.behaviours = ["no length"]
    get(server, tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_wrong_content_is_refused_and_the_old_file_kept(server, tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(UserError) as caught:
        get(server, path, content=b"something else")
    message = str(caught.value)
    assert f"{server.base}/a.bin" in message and f"put it at {path}" in message
    assert hashlib.md5(CONTENT).hexdigest() in message
    assert hashlib.md5(b"something else").hexdigest() in message
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]


def test_missing_file_is_an_error_at_once(server, tmp_path):
    server.files = {}
    with pytest.raises(UserError, match=r"no longer gives it out \(.* 404: .* put it at .*a\.bin"):
        get(server, tmp_path / "a.bin")
    assert len(server.log) == 1 and os.listdir(tmp_path) == []


def test_busy_server_is_asked_again_with_growing_waits(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    server.behaviours = ["503", "500", "429"]
    fetch(f"{server.base}/a.bin", tmp_path / "a.bin", md5(CONTENT), backoff=2)
    assert waits == [2, 4, 8]
    server.behaviours = ["503"] * 9
    with pytest.raises(UserError, match="503"):
        get(server, tmp_path / "b.bin", tries=3)
    assert len(server.log) == 4 + 3


def test_tries_count_only_failures_without_a_new_byte(server, tmp_path):
    server.behaviours = ["truncate"] * 4
    get(server, tmp_path / "a.bin", tries=2)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_refused_connection_names_url_file_and_way_out(server, tmp_path):
    server.shutdown()
    server.server_close()
    path = tmp_path / "a.bin"
    with pytest.raises(UserError) as caught:
        get(server, path, tries=2)
    assert f"cannot download {server.base}/a.bin" in str(caught.value)
    assert "refused" in str(caught.value) and f"put it at {path}" in str(caught.value)


def test_no_url_and_unknown_hash_are_named(tmp_path):
    with pytest.raises(UserError, match="unknown url type"):
        fetch("mirror/a.bin", tmp_path / "a.bin", md5(CONTENT))
    with pytest.raises(ValueError, match=r"'crc:1' names none of \['git', 'md5', 'sha256'\]"):
        fetch("http://127.0.0.1/a.bin", tmp_path / "a.bin", "crc:1")


def test_git_blob_id_verifies(server, tmp_path):
    server.files["/a.bin"] = b"test content\n"
    url, path = f"{server.base}/a.bin", tmp_path / "a.bin"
    # the example of Pro Git, chapter 10.2
    fetch(url, path, "git:d670460b4b4aece5915caf5c68d12f560a9fe3e4")
    assert path.read_bytes() == b"test content\n"


def test_beginning_of_a_sha256_verifies(server, tmp_path):
    digest = hashlib.sha256(CONTENT).hexdigest()
    url, path = f"{server.base}/a.bin", tmp_path / "a.bin"
    assert fetch(url, path, f"sha256:{digest[:8]}").read_bytes() == CONTENT
    with pytest.raises(UserError, match=f"sha256 {digest}, not 12345678"):
        fetch(url, tmp_path / "b.bin", "sha256:12345678")
    assert not (tmp_path / "b.bin").exists()


@pytest.mark.parametrize("checksum", ["sha256:", None])
def test_nothing_to_verify_by_is_refused(tmp_path, checksum):
    with pytest.raises(ValueError, match="nothing would verify|names none of"):
        fetch("http://127.0.0.1/a.bin", tmp_path / "a.bin", checksum)


def test_without_a_checksum_a_check_decides(server, tmp_path):
    url, path = f"{server.base}/a.bin", tmp_path / "a.bin"
    path.write_bytes(b"old")

    def check(file):
        return "" if file.read_bytes() == CONTENT[::-1] else "wrong way round"

    with pytest.raises(UserError, match=rf"{len(CONTENT)} bytes .*a\.bin \(wrong way round\)"):
        fetch(url, path, None, check=check)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]
    server.files["/a.bin"] = CONTENT[::-1]
    assert fetch(url, path, None, check=check).read_bytes() == CONTENT[::-1]
    requests = len(server.log)
    fetch(url, path, None, check=check)
    assert len(server.log) == requests


def test_web_page_in_place_of_the_file_is_refused_at_once(server, tmp_path):
    path = tmp_path / "a.bin"
    part_of(path).write_bytes(CONTENT[:1000])
    server.behaviours = ["web page"]
    with pytest.raises(UserError, match=r"a web page in place of the file; .* put it at .*a\.bin"):
        get(server, path)
    assert len(server.log) == 1
    assert part_of(path).read_bytes() == CONTENT[:1000] and not path.exists()


def test_host_that_does_not_exist_is_named_with_the_way_out(tmp_path, monkeypatch):
    def unknown(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match=r"host is not found .*put it at .*a\.bin"):
        fetch("http://host.invalid/a", tmp_path / "a.bin", md5(b""), tries=1)


# Google Drive

DRIVE = "https://drive.google.com/file/d/1IHX-vQ_z/view"


def fake_gdown(monkeypatch, answer, timeout=True):
    """gdown whose download hands what it is asked to ``answer``; its parameters are the real ones
    of release 6.3, or of 5.2, which has no timeout."""

    def new(url=None, output=None, quiet=False, proxy=None, speed=None, use_cookies=True,
            verify=True, id=None, resume=False, format=None, user_agent=None, log_messages=None,
            progress=None, skip_download=False, cookies_file=None, hasher=None, timeout=None,
            retries=0):  # fmt: skip
        return answer(id=id, output=output, resume=resume, cookies=use_cookies, timeout=timeout)

    def old(url=None, output=None, quiet=False, proxy=None, speed=None, use_cookies=True,
            verify=True, id=None, fuzzy=False, resume=False, format=None, user_agent=None,
            log_messages=None):  # fmt: skip
        return answer(id=id, output=output, resume=resume, cookies=use_cookies, timeout=None)

    download = new if timeout else old
    monkeypatch.setitem(sys.modules, "gdown", types.SimpleNamespace(download=download))


@pytest.mark.parametrize("timeout", [7, None])
def test_drive_files_come_by_gdown_and_are_verified(tmp_path, monkeypatch, timeout):
    asked = []

    def good(**options):
        asked.append(options)
        pathlib.Path(options["output"]).write_bytes(CONTENT)
        return options["output"]

    fake_gdown(monkeypatch, good, timeout is not None)
    path = tmp_path / "a.pth"
    assert fetch(DRIVE, path, md5(CONTENT), timeout=7).read_bytes() == CONTENT
    assert asked == [{"id": "1IHX-vQ_z", "output": f"{path}.part", "resume": True,
                      "cookies": False, "timeout": timeout}]  # fmt: skip
    with pytest.raises(UserError, match=f"{DRIVE} gave {len(CONTENT)} bytes that are not b.pth"):
        fetch(DRIVE, tmp_path / "b.pth", md5(b"other"))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_without_gdown_the_link_and_the_place_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(UserError) as caught:
        fetch(DRIVE, tmp_path / "a.pth", md5(CONTENT))
    assert "pip install gdown" in str(caught.value)
    assert f"open {DRIVE} and" in str(caught.value)
    assert f"put it at {tmp_path / 'a.pth'}" in str(caught.value)


def test_what_drive_refuses_is_one_sentence(tmp_path, monkeypatch):
    def quota(**options):
        raise RuntimeError("\n\tToo many users have viewed the file.\n\tTry later.")

    for refuse in (quota, lambda **options: None):
        fake_gdown(monkeypatch, refuse)
        with pytest.raises(UserError, match=r"cannot download https://drive.*put it at") as caught:
            fetch(DRIVE, tmp_path / "a.pth", md5(CONTENT))
        assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_more_than_one_leftover_of_gdown_is_named_and_not_blamed_on_drive(tmp_path, monkeypatch):
    fake_gdown(monkeypatch, lambda **options: None, timeout=False)
    for name in ("a.pth.part1.part", "a.pth.part2.part"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError) as caught:
        fetch(DRIVE, tmp_path / "a.pth", md5(CONTENT))
    for text in ("2 parts of it are there", "a.pth.part1.part", "a.pth.part2.part", "delete them"):
        assert text in str(caught.value)
    assert "refuses" not in str(caught.value) and len(os.listdir(tmp_path)) == 2


def test_a_bad_leftover_of_gdown_is_given_up_for_a_new_download(tmp_path, monkeypatch):
    def download(output, **options):
        kept = [p for p in tmp_path.iterdir() if p.name.startswith("a.pth.part")]
        content = b"".join(p.read_bytes() for p in kept) + CONTENT
        for p in kept:
            p.unlink()
        pathlib.Path(output).write_bytes(content)
        return output

    fake_gdown(monkeypatch, download)
    (tmp_path / "a.pth.partxyz.part").write_bytes(b"old")
    assert fetch(DRIVE, tmp_path / "a.pth", md5(CONTENT)).read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["a.pth"]


def test_full_disk_keeps_what_has_arrived(server, tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    open_ = pathlib.Path.open

    class Full(io.BufferedWriter):
        def write(self, chunk):
            if self.tell() >= 2 * download.CHUNK:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(chunk)

    def open_full(self, mode="r", *args):
        return (
            Full(io.FileIO(self, mode))
            if self.suffix == ".part" and mode[0] in "wa"
            else open_(self, mode, *args)
        )

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", open_full)
        with pytest.raises(UserError, match=r"a\.bin as .*a\.bin: No space left .* make room"):
            get(server, path)
    assert part_of(path).stat().st_size == 2 * download.CHUNK
    get(server, path)
    assert path.read_bytes() == CONTENT
    assert server.log[-1] == ("/a.bin", f"bytes={2 * download.CHUNK}-")


def test_progress_rewrites_one_line_on_a_terminal_only(server, tmp_path, monkeypatch, capsys):
    get(server, tmp_path / "a.bin")
    assert capsys.readouterr().err == "a.bin: 0.4 MB of 0.4 MB (100 %)\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    get(server, tmp_path / "b.bin")
    assert capsys.readouterr().err.endswith("\rb.bin: 0.4 MB of 0.4 MB (100 %)\n")


# Archives


def tar_of(files):
    """Bytes of a tar of {name: content or TarInfo type}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes) and content not in tarfile.SUPPORTED_TYPES:
                info.size = len(content)
            else:
                info.type, info.linkname, content = content, "../../outside", b""
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize("modern", [True, False], ids=["data filter", "no data filter"])
@pytest.mark.parametrize(
    "name, content, problem",
    [
        ("../evil", b"evil", "leaves the folder"),
        ("a/../../evil", b"evil", "leaves the folder"),
        ("a\\..\\..\\evil", b"evil", "leaves the folder"),
        ("/tmp/evil", b"evil", "absolute name"),
        ("C:\\evil", b"evil", "absolute name"),
        ("link", tarfile.SYMTYPE, "neither a file nor a folder"),
        ("hard", tarfile.LNKTYPE, "neither a file nor a folder"),
        ("device", tarfile.CHRTYPE, "neither a file nor a folder"),
        ("pipe", tarfile.FIFOTYPE, "neither a file nor a folder"),
    ],
)
def test_dangerous_archive_is_refused_whole(tmp_path, monkeypatch, modern, name, content, problem):
    if not modern:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive = tmp_path / "in" / "bad.tar"
    archive.parent.mkdir()
    archive.write_bytes(tar_of({"good": b"good file", name: content}))
    with pytest.raises(UserError) as caught:
        extract_tar(archive, tmp_path / "out")
    assert str(archive) in str(caught.value) and problem in str(caught.value)
    assert repr(name) in str(caught.value)
    assert os.listdir(tmp_path) == ["in"] and os.listdir(archive.parent) == ["bad.tar"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("modern", [True, False], ids=["data filter", "no data filter"])
def test_archive_is_unpacked_over_what_is_there(tmp_path, monkeypatch, modern):
    if not modern:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar_of({"d": tarfile.DIRTYPE, "d/x": b"new x", "y": b"new y"}))
    out = tmp_path / "out"
    (out / "d").mkdir(parents=True)
    (out / "d" / "x").write_bytes(b"an older x")
    (out / "d" / "z").write_bytes(b"z")
    extract_tar(archive, out)
    found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert found == {"d/x": b"new x", "d/z": b"z", "y": b"new y"}


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>moved</html>" * 50, tar_of({"d/x": b"x" * 9999, "y": b"y"})[:5000]],
    ids=["empty", "web page", "cut short"],
)
def test_what_is_no_whole_archive_is_an_error(tmp_path, content):
    archive = tmp_path / "a.tar"
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tar is no whole tar archive .* get it again"):
        extract_tar(archive, tmp_path / "out")


def test_unpacking_without_room_leaves_its_mark(tmp_path):
    archive = tmp_path / "a.tar"
    archive.write_bytes(tar_of({"d/x": b"x of d", "e": b"e"}))
    (tmp_path / "d").write_bytes(b"a file where a folder must be")
    with pytest.raises(UserError, match=r"cannot unpack .*a\.tar into .* run again"):
        extract_tar(archive, tmp_path)
    assert unpacking_mark(archive, tmp_path).exists()


# Pascal VOC


def voc_tar(year, image_set, ids, without=()):
    top = f"VOCdevkit/VOC{year}"
    files = {f"{top}/ImageSets/Main/{image_set}.txt": "".join(f"{i}\n" for i in ids).encode()}
    for i in ids:
        files[f"{top}/Annotations/{i}.xml"] = b"<annotation/>"
        files[f"{top}/JPEGImages/{i}.jpg"] = b"\xff\xd8 picture \xff\xd9"
    return tar_of({name: content for name, content in files.items() if name not in without})


@pytest.fixture
def mirror(server, monkeypatch):
    """The server as a mirror of small archives; .md5 holds the checksums of the published ones."""
    server.md5 = {}
    tars = {
        "trainval": voc_tar("2007", "trainval", ["000005", "000007"]),
        "test": voc_tar("2007", "test", ["000001"]),
    }
    small = []
    for (image_set, name, published, _), count in zip(voc.ARCHIVES["2007"], (2, 1), strict=True):
        server.files[f"/voc2007/{name}"] = tars[image_set]
        server.md5[published] = hashlib.md5(tars[image_set]).hexdigest()
        small.append((image_set, name, server.md5[published], count))
    monkeypatch.setitem(voc.ARCHIVES, "2007", tuple(small))
    server.args = ["2007", "--url-base", server.base + "/"]
    return server


def test_voc_is_fetched_once_and_unpacked(mirror, tmp_path, capsys):
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 0
    year_dir = tmp_path / "VOCdevkit" / "VOC2007"
    assert sorted(os.listdir(year_dir / "JPEGImages")) == ["000001.jpg", "000005.jpg", "000007.jpg"]
    assert (year_dir / "ImageSets" / "Main" / "trainval.txt").read_text() == "000005\n000007\n"
    assert "trainval, 2 pictures" in capsys.readouterr().out
    for archive in tmp_path.glob("*.tar"):
        archive.unlink()
    requests = len(mirror.log)
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "trainval is already complete, 2 pictures" in out
    assert "test is already complete, 1 pictures" in out
    assert len(mirror.log) == requests == 2


@pytest.mark.parametrize("damage", ["no picture", "empty annotation", "cut short"])
def test_voc_that_is_not_complete_is_unpacked_again(mirror, tmp_path, damage):
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 0
    year_dir = tmp_path / "VOCdevkit" / "VOC2007"
    picture = year_dir / "JPEGImages" / "000005.jpg"
    annotation = year_dir / "Annotations" / "000005.xml"
    if damage == "no picture":
        picture.unlink()
    elif damage == "empty annotation":
        annotation.write_bytes(b"")
    else:
        picture.write_bytes(b"half")
        unpacking_mark(tmp_path / "VOCtrainval_06-Nov-2007.tar", tmp_path).touch()
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 0
    assert picture.read_bytes().endswith(b"\xff\xd9") and annotation.read_bytes()
    assert len(mirror.log) == 2  # the archives were still there
    assert not list(tmp_path.glob(".*"))


def test_voc_mistakes_are_one_sentence_and_exit_code_2(mirror, tmp_path, capsys, monkeypatch):
    image_set, name, *_ = voc.ARCHIVES["2007"][0]
    lacking = voc_tar(
        "2007", image_set, ["000005"], without=["VOCdevkit/VOC2007/JPEGImages/000005.jpg"]
    )
    mirror.files[f"/voc2007/{name}"] = lacking
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "try again later or another mirror" in error and error.startswith("error: ")
    monkeypatch.setitem(voc.ARCHIVES, "2007", ((image_set, name, md5(lacking)[4:], 1),))
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "lacks pictures or annotations of trainval, which has 1" in error and name in error


def test_voc_with_a_shortened_split_list_is_not_complete(mirror, tmp_path, capsys):
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 0
    split = tmp_path / "VOCdevkit/VOC2007/ImageSets/Main/trainval.txt"
    split.write_text("000005\n")
    capsys.readouterr()
    assert voc.main([*mirror.args, "--root", str(tmp_path)]) == 0
    assert "trainval is already complete" not in capsys.readouterr().out
    assert split.read_text() == "000005\n000007\n"


def test_voc_counts_are_the_official_ones():
    counts = {(y, image_set): n for y, rows in voc.ARCHIVES.items() for image_set, *_, n in rows}
    assert counts == {
        ("2007", "trainval"): 5011,
        ("2007", "test"): 4952,
        ("2012", "trainval"): 11540,
    }


def test_interrupted_voc_exits_130(monkeypatch, tmp_path, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(voc, "fetch", interrupt)
    assert voc.main(["2012", "--root", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
def test_voc_shell_script_works_from_any_folder_and_passes_arguments_on(mirror, tmp_path):
    copy = tmp_path / "a copy"
    shutil.copytree(REPO / "data" / "scripts", copy / "data" / "scripts")
    shutil.copytree(REPO / "utils", copy / "utils", ignore=shutil.ignore_patterns("nms"))
    module = copy / "data" / "scripts" / "voc.py"
    text = module.read_text()
    for published, small in mirror.md5.items():
        assert published in text
        text = text.replace(published, small)
    for official, count in ((" 5011)", " 2)"), (" 4952)", " 1)")):
        assert official in text
        text = text.replace(official, count)
    module.write_text(text)
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "utils").mkdir(parents=True)
    (elsewhere / "utils" / "__init__.py").write_text("raise SystemExit('a stranger')\n")
    python = pathlib.Path(sys.executable)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python3").symlink_to(python)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])

    def script(*args):
        return subprocess.run(
            [copy / "data" / "scripts" / "VOC2007.sh", *args],
            cwd=elsewhere,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
        )

    done = script("--root", "voc root", "--url-base", mirror.base)
    assert done.returncode == 0, done.stderr
    pictures = elsewhere / "voc root" / "VOCdevkit" / "VOC2007" / "JPEGImages"
    assert len(os.listdir(pictures)) == 3
    bad = script("--root", "other", "--url-base", f"{mirror.base}/gone")
    assert bad.returncode == 2 and "HTTP Error 404" in bad.stderr
    assert "Traceback" not in bad.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize("year", ["2007", "2012"])
def test_voc_shell_scripts_name_their_year(year, tmp_path):
    script = REPO / "data" / "scripts" / f"VOC{year}.sh"
    assert os.access(script, os.X_OK)
    (tmp_path / "python3").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    path = os.pathsep.join([str(tmp_path), os.environ["PATH"]])
    done = subprocess.run(
        [script, "--root", "x"],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{REPO}/data/scripts/voc.py {year} --root x\n"
