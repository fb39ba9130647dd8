"""Mutations of files as Hypothesis strategies, so that the edits of a failing file are reduced.

An edit is (name, at, to, value). The edits of `BYTES` change bytes, those of `TREE` the lists and
dicts that a codec, a pair (load, dump), makes of the file.
"""

import io
import json
import math
import zipfile
from contextlib import suppress
from copy import deepcopy
from itertools import product
from xml.etree import ElementTree
from xml.sax.saxutils import escape, quoteattr

import numpy as np
import torch
import yaml
from hypothesis import strategies as st

VALUES = (
    0, 1, -1, 0.5, None, True, "", " ", [], {}, [[0, 0]], {"a": []}, "NaN", "-1", "1e999", "0x1F",
    math.nan, math.inf, 1e300, 1e-300, 2**31, 2**63, 10**40, "10" * 3000, "a\0b", "\ud800",
    "e\u0301", "x" * 300, "..", "../../x", "/dev/null", "C:\\x", "\n", "~", "\x1b[31m", "=1+1",
    "{0}", "%s", "١٢", "1_0", json.loads("[" * 90 + "]" * 90),
)  # fmt: skip
ARRAYS = (
    np.zeros(0), np.array(math.nan), np.full(3, -1), np.array(["x"]), np.ones((2, 2, 2)),
    np.array([2**62, 2**62]), np.array(1j), np.array("2001-01-01", "M8[D]"), np.array([[]]),
    np.full((2, 4), math.inf, np.float32), np.array(b"\xff"), np.arange(4, dtype=np.int8),
)
TENSORS = (
    torch.zeros(0), torch.tensor(math.nan), torch.zeros(1).expand(1 << 40), torch.ones(2, 2),
    torch.zeros(2, 2).to_sparse(), torch.ones(2, dtype=torch.complex64), torch.empty(3).half(),
    torch.ones(4, dtype=torch.bool), torch.empty(2, device="meta"), torch.Size([1]), torch.int8,
)
SNIPPETS = (
    b"\0", b"\xff", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\r", b"\n", b" ", b"-", b"1", b"e9", b"NaN",
    b"[" * 5000, b"[" * 5000 + b"]" * 5000, b"<a>" * 5000, b"- " * 2000, b"\xff\xd8\xff\xd9",
    b'{"a":' * 5000, b"&#0;", b"&e;", b'<?xml version="1.0" encoding="utf8"?>', b"\xff\xff\xff",
    b'<!DOCTYPE a [<!ENTITY e "eeeeeeee">]>', b"<!--", b"]]>", b"&a", b"*a", b"!!python/name:os ",
    b'<?xml version="1.0" encoding="rot13"?>', b"\x1a", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"PK\5\6",
)  # fmt: skip
ENCODINGS = ("utf-16", "utf-8-sig", "latin-1", "utf-16-le", "utf-32", "cp1252", "utf-7", "cp500")


def _swap_lines(data, at, to):
    lines = data.split(b"\n")
    at, to = at % len(lines), to % len(lines)
    lines[at], lines[to] = lines[to], lines[at]
    return b"\n".join(lines)


def _snippet(data, at, to):
    start = at % (len(data) + 1) if at % 4 else 0
    return data[:start] + SNIPPETS[to % len(SNIPPETS)] + data[start:]


def _block(data, at, to, times):
    start = at % (len(data) + 1)
    end = start + 1 + to % max(len(data) // 2, 16)
    return data[:start] + times * data[start:end] + data[end:]


def _flip(data, at, to):
    at %= len(data)
    return data[:at] + bytes([data[at] ^ 1 << to % 8]) + data[at + 1 :]


BYTES = {
    "cut": lambda data, at, to: data[: at % (len(data) + 1)],
    "flip": _flip, "insert": _snippet, "swap lines": _swap_lines,
    "drop": lambda data, at, to: _block(data, at, to, 0),
    "repeat": lambda data, at, to: _block(data, at, to, 2),
    "encode": lambda data, at, to: data.decode().encode(ENCODINGS[to % len(ENCODINGS)]),
}  # fmt: skip
TREE = ("replace", "delete", "copy", "double", "nest", "rename")


def places(tree):
    """Yield (container, key) of every value."""
    if isinstance(tree, list | dict):
        for key in range(len(tree)) if isinstance(tree, list) else list(tree):
            yield tree, key
            yield from places(tree[key])


def change_tree(name, tree, at, to, value):
    box = [tree]
    found = [*places(box)]
    (container, key), (other, there) = found[at % len(found)], found[to % len(found)]
    match name:
        case "replace":
            container[key] = deepcopy(value)
        case "delete":
            del container[key]
        case "copy":
            container[key] = deepcopy(other[there])
        case "double":
            container[key:key] = deepcopy(container[key : key + 1])
        case "nest":
            container[key] = {"a": container[key]} if to % 2 else [container[key]]
        case "rename":
            container[str(value)] = container.pop(key)
    return box[0]


def written(write):
    """Return the bytes that ``write`` writes into a file."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def change_member(data, at, to):
    """Change the bytes of a member of a zip, whose checksum then is right."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = {name: file.read(name) for name in file.namelist()}
    name, how = [*members][to % len(members)], [*BYTES.values()][at % len(BYTES)]
    members[name] = how(members[name], at // len(BYTES), to // len(members))
    with zipfile.ZipFile(file := io.BytesIO(), "w") as target:
        for name, content in members.items():
            target.writestr(name, content)
    return file.getvalue()


def load_xml(data):
    def tree(e):
        return {"tag": e.tag, "with": dict(e.attrib), "text": e.text or "", "in": [*map(tree, e)]}

    return tree(ElementTree.fromstring(data))


def dump_xml(tree):
    if not isinstance(tree, dict):
        return escape(str(tree)).encode("utf-8", "surrogatepass")
    tag, having, text, inside = (tree.get(key, "") for key in ("tag", "with", "text", "in"))
    values = "".join(f" {name}={quoteattr(str(value))}" for name, value in dict(having).items())
    start = f"<{tag}{values}>{escape(str(text))}".encode("utf-8", "surrogatepass")
    inside = b"".join(map(dump_xml, inside if isinstance(inside, list) else [inside]))
    return start + inside + f"</{tag}>\n".encode("utf-8", "surrogatepass")


def dump_words(lines):
    lines = (map(str, line) if isinstance(line, list) else [str(line)] for line in lines)
    return "\n".join(map(" ".join, lines)).encode("utf-8", "surrogatepass")


JSON = json.loads, lambda tree: json.dumps(tree, indent=1).encode()
JSON_LINES = (lambda data: [*map(json.loads, data.splitlines())],
              lambda tree: "\n".join(map(json.dumps, tree)).encode())  # fmt: skip
XML = load_xml, dump_xml
YAML = yaml.safe_load, lambda tree: yaml.safe_dump(tree, sort_keys=False).encode()
WORDS = lambda data: [line.split() for line in data.decode().split("\n")], dump_words
NPZ = (lambda data: dict(np.load(io.BytesIO(data))),
       lambda tree: written(lambda file: np.savez(file, **tree)))  # fmt: skip
PTH = (lambda data: torch.load(io.BytesIO(data), weights_only=True),
       lambda tree: written(lambda file: torch.save(tree, file)))  # fmt: skip


def values(codec):
    return (*VALUES, *{NPZ: ARRAYS, PTH: TENSORS}.get(codec, ()))


def edits(codec=None):
    """Return a strategy of one to four edits; without a codec they are of bytes."""
    names = [*BYTES, *["member"] * 3 * (codec in (NPZ, PTH)), *TREE * 2 * bool(codec)]
    place = st.integers(0, 15) | st.integers(0, 2**20)
    edit = st.tuples(st.sampled_from(names), place, place, st.sampled_from(values(codec)))
    return st.lists(edit, min_size=1, max_size=4)


def replacements(data, codec):
    """Yield lists of one edit: each place that the codec finds, and each value there."""
    for at, value in product(range(1 + len([*places(codec[0](data))])), values(codec)):
        yield [("replace", at, 0, value)]


def mutate(data, changes, codec=None):
    """Return the bytes after the edits. An edit that does not suit what is left does nothing."""
    for name, at, to, value in changes:
        with suppress(Exception):  # the file is damaged by now, or cannot hold the value
            if name in TREE:
                data = codec[1](change_tree(name, codec[0](data), at, to, value))
            else:
                data = (BYTES | {"member": change_member})[name](data, at, to)
    return data
