"""Declare an option as a field of a dataclass: its default, its flags, its rule and its help."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection
from dataclasses import field

from utils.errors import UserError


def option(
    group: str, default: object, *flags: str, help: str, read: Callable[[str], object] = str,
    choices: Collection | None = None, metavar: str | None = None, only: str = "",
    fixed: bool = False, machine: bool = False, check: Callable[[object], object] | None = None,
) -> dataclasses.Field:
    """Declare an option.

    Args:
        group: heading in ``--help``.
        default: value of a call that neither gives the option nor finds it elsewhere.
        flags: spellings on the command line; none for a value that only a checkpoint records.
        read: turns text into a value, or raises ``argparse.ArgumentTypeError``.
        choices: the values that exist.
        only: "train" or "test" for an option that the other kind of call refuses.
        fixed: a resumed run cannot change it.
        machine: it suits the machine that trains; ``--test`` does not take it from a checkpoint.
        check: turns a value from Python or a checkpoint into the value of the field, for options
            whose ``read`` alone does not do it.
    """
    return field(default=default, metadata={k: v for k, v in locals().items() if k != "default"})


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
        if isinstance(value, bool) or value not in meta["choices"]:
            known = ", ".join(map(str, meta["choices"]))
            raise UserError(f"{name} is {value!r}; choose from {known}")
        return value
    if meta["read"] is str:
        if not isinstance(value, str):
            raise UserError(f"{name} is {value!r}; give a text")
        return value
    try:
        read = meta["read"](str(value))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"{name}: {error}") from error
    if read != value:
        raise UserError(f"{name} is {value!r}; give {read!r}")
    return read


class Checked:
    """A dataclass of options whose values keep their rules, wherever they come from."""

    def __post_init__(self) -> None:
        for spec in dataclasses.fields(self):
            object.__setattr__(self, spec.name, check_value(spec, getattr(self, spec.name)))
