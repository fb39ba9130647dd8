"""The measures of the house: no file or function outgrows a reader; one meaning per option."""

import argparse
import ast
import dataclasses
import importlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NoReturn

import pytest
from test_imports import ROOMS, ROOT, files_of

from engine import options
from tools.__main__ import commands
from utils.arguments import boolean

READING_PATH = ("engine", "models", "layers", "data", "inference")
MOST_LINES = {**dict.fromkeys(ROOMS, 520), **dict.fromkeys(READING_PATH, 400), "train_test": 200}
MOST_LINES_OF_A_FUNCTION = 60
MOST_NAMES_OF_TRAIN_TEST = 30

ROOMS_MEASURED = [room for room in ROOMS if room != "docs"]
FILES = {room: files_of(room) for room in ROOMS_MEASURED}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Yield ("file:function", lines with decorators and docstring) of every function of a file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            start = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            yield f"{name_of(path)}:{node.name}", node.end_lineno - start + 1


@pytest.mark.parametrize("room", ROOMS_MEASURED)
def test_no_file_is_too_long(room):
    for path in FILES[room]:
        lines, name = len(path.read_text("utf-8").splitlines()), name_of(path)
        assert lines <= MOST_LINES[room], f"{name} has {lines} lines"


@pytest.mark.parametrize("room", ROOMS_MEASURED)
def test_no_function_is_too_long(room):
    for path in FILES[room]:
        for name, lines in functions(path):
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{name} has {lines} lines"


def test_a_usual_function_is_short():
    assert median(n for paths in FILES.values() for p in paths for _, n in functions(p)) <= 9


def test_train_test_imports_few_names():
    tree = ast.parse((ROOT / "train_test.py").read_text("utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = sum(len(node.names) for node in imports)
    assert names <= MOST_NAMES_OF_TRAIN_TEST


COMMANDS = [*(f"tools.{name}" for name in commands()), "data.voc_eval", "data.coco_eval"]


def parser_of(command: str, monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    """Return the parser that a command builds."""
    built = []

    def capture(parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        built.append(parser)
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", capture)
    with pytest.raises(SystemExit):
        importlib.import_module(command).main([])
    return built[0]


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the options and positional arguments of a parser and of its subcommands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from actions(one)
        else:
            yield action


def reads(action: argparse.Action) -> object:
    """Return the function that reads the text of an option.

    A path is a text. A switch is a boolean, with or without a value.
    """
    if action.nargs == 0:
        return boolean
    return str if action.type in (None, str, Path) else action.type


OPTIONS_OF_TRAIN_TEST = {
    flag.replace("_", "-"): action
    for action in options.parser()._actions
    for flag in action.option_strings
}


def test_an_option_has_one_declaration():
    declared = [
        flag.replace("_", "-")
        for kind in (options.Options, options.Call)
        for spec in dataclasses.fields(kind)
        for flag in spec.metadata["flags"]
    ]
    assert len(set(declared)) == len(declared)
    assert {*declared, "-h", "--help"} == OPTIONS_OF_TRAIN_TEST.keys()


@pytest.mark.parametrize("command", COMMANDS)
def test_an_option_of_train_test_is_read_alike_by_every_command(command, monkeypatch):
    for action in actions(parser_of(command, monkeypatch)):
        for flag in action.option_strings:
            one = OPTIONS_OF_TRAIN_TEST.get(flag.replace("_", "-"), action)
            assert reads(action) is reads(one), f"{command} reads {flag} in another way"
