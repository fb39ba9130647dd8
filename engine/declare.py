"""Declare an option as a field of a dataclass: its default, its flags, its rule and its help."""

import argparse
import dataclasses
from collections.abc import Callable, Collection
from dataclasses import field

from utils.errors import UserError


def option(group: str, default: object, *flags: str, help: str, read: Callable[[str], object] = str,
           choices: Collection | None = None, metavar: str | None = None, only: str = "",
           fixed: bool = False, machine: bool = False,
           check: Callable[[object], object] | None = None) -> dataclasses.Field:
    """Declare an option.

    Args:
        group: heading in ``--help``.
        default: value of a call that neither gives the option nor finds it elsewhere.
        flags: spellings on the command line; none for a value that only a checkpoint records.
        read: turns text into a value, or raises ``argparse.ArgumentTypeError``.
        help: text of ``--help``; metavar: name of the value there.
        choices: the values that exist.
        only: "train" or "test" for an option that the other kind of call refuses.
        fixed: a resumed run cannot change it.
        machine: it suits the machine that trains; ``--test`` does not take it from a checkpoint.
        check: turns a value from Python or a checkpoint into the value of the field; needed if that
            is not what ``read`` returns, such as a tuple of image sets.
    """
    return field(default=default, metadata={
        "group": group, "flags": flags, "help": help, "read": read, "choices": choices,
        "metavar": metavar, "only": only, "fixed": fixed, "machine": machine, "check": check,
    })  # fmt: skip


def flag_of(spec: dataclasses.Field) -> str:
    """Return the long flag that messages name."""
    return next((flag for flag in spec.metadata["flags"] if flag.startswith("--")), spec.name)


def check_value(spec: dataclasses.Field, value: object) -> object:
    """Return ``value`` as the option holds it.

    Raises:
        UserError: the value breaks the option's rule.
    """
    meta, name = spec.metadata, flag_of(spec)
    if value is None and spec.default is None:
        return None
    if meta["check"]:
        return meta["check"](value)
    if meta["choices"] is not None:
        wanted = str if spec.default is None else type(spec.default)
        if type(value) is not wanted or value not in meta["choices"]:
            known = ", ".join(map(str, meta["choices"]))
            raise UserError(f"{name} is {value!r:.80}; choose from {known}")
        return value
    if meta["read"] is str:
        if not isinstance(value, str) or "\0" in value:
            raise UserError(f"{name} is {value!r:.80}; give a text without NUL")
        if not value and spec.default is None:
            raise UserError(f"{name} is empty; give a value, or leave the option out")
        return value
    try:
        read = meta["read"](str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from error
    if read != value or isinstance(value, bool) is not isinstance(read, bool):
        raise UserError(f"{name} is {value!r:.80}; give {read!r}")
    return read


class Checked:
    """A dataclass of options whose values keep their rules, wherever they come from."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, check_value(spec, getattr(self, spec.name)))
