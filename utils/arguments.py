"""Values of command-line arguments; each function is a ``type`` of ``argparse``."""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from utils.console import printable


class Parser(argparse.ArgumentParser):
    """A parser that takes --some_option and --some-option for each other, whichever is declared.

    A mistake is told in one line, with the nearest name of a misspelt option or choice.
    """

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None,
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        declared = {name.replace("_", "-"): name
                    for action in self._actions for name in action.option_strings}
        end = words.index("--") if "--" in words else len(words)
        for k, word in enumerate(words[:end]):
            name, equals, value = word.partition("=")
            key = name.replace("_", "-")
            if key.startswith("--"):
                words[k] = declared.get(key, name) + equals + value
            # Told before what argparse would miss because of it. Subcommands have their own.
            mistaken = key[:1] == "-" and f"-{key}" in declared
            if key.startswith("--"):
                mistaken = not any(each == key or self.allow_abbrev and each.startswith(key)
                                   for each in declared)
            if mistaken and self._subparsers is None:
                self.error(f"unknown option {name}{did_you_mean(name, declared.values())}")
        given, left = super().parse_known_args(words, namespace)
        if left and os.path.isdir(left[0]) and "--root" in declared:
            self.error(f"{left[0]} is a folder without an option; give --root {left[0]}")
        return given, left

    def _check_value(self, action: argparse.Action, value: object) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(value, action.choices)
            raise

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {printable(message)}; {self.prog} --help explains the options\n")


def did_you_mean(word: object, names: Iterable[object]) -> str:
    """Return "; did you mean NAME?" with the name that is nearest to a word, "" if none is near."""
    keys = {_spelling(name): name for name in names}
    return "".join(f"; did you mean {keys[key]}?"
                   for key in difflib.get_close_matches(_spelling(word), keys, 1))


def _spelling(name: object) -> str:
    return str(name).casefold().replace("_", "-").lstrip("-")


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # fewer than the machine has under taskset or in a job
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def boolean(text: str) -> bool:
    """Read true, yes, 1, false, no or 0."""
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return values[text.lower()]


def count(text: str) -> int:
    """Read a whole number of 0 or more."""
    # 15 digits: more than any count has, and a valid seed for every random generator.
    if not text.isdecimal() or len(text) > 15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """Read a whole number of 1 or more."""
    if count(text) == 0:
        raise argparse.ArgumentTypeError("0 is too small, the least is 1")
    return int(text)


def steps_or_boolean(text: str) -> int:
    """Read a number of steps; the published option was a boolean for every tenth step."""
    words = {"true": 10, "false": 0}
    return words[text.lower()] if text.lower() in words else count(text)


def number(text: str) -> float:
    """Read a finite number of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return value


def fraction(text: str) -> float:
    """Read a number in 0..1."""
    value = number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def folder_name(text: str) -> str:
    """Read the name of a folder: one part of a path."""
    if not text.strip(". ") or any(c in text for c in "/\\\0"):
        raise argparse.ArgumentTypeError(f"{text!r} cannot name a folder")
    return text
