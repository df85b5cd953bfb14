"""Checks of what callers hand in, before anything is done: each gives the value back, or says what is wrong with it."""

from __future__ import annotations

import math
from typing import TypeVar

from megastow.errors import InvalidArgumentError, InvalidTypeError

_T = TypeVar("_T")


def instance_of(name: str, value: object, expected: type[_T], words: str) -> _T:
    """An object of a class.

    Raises:
        InvalidTypeError: it is something else.
    """
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise InvalidTypeError(f"{name} is a {type(value).__qualname__}; expected {words}")
    return value


def flags(**values: object) -> None:
    """Each True or False, by the names of the arguments, and nothing that only counts as such.

    Raises:
        InvalidTypeError: one is something else.
    """
    for name, value in values.items():
        instance_of(name, value, bool, "True or False")


def whole_number(name: str, value: object, of: str, *, least: int = 0) -> int:
    """A whole number, of bytes for example.

    Raises:
        InvalidTypeError: it is something else.
        InvalidArgumentError: it is less than `least`.
    """
    number = instance_of(name, value, int, f"a whole number of {of}")
    if number < least:
        raise InvalidArgumentError(f"{name} is {number}; expected a number of {of}, at least {least}")
    return number


def duration(name: str, value: object, *, is_limit: bool = False) -> float:
    """A time in seconds that is not for ever.

    Args:
        name: of the argument.
        value: what was given.
        is_limit: whether something is to be done in that time, so that none at all would be too little.

    Raises:
        InvalidTypeError: it is no number.
        InvalidArgumentError: it is negative, infinite, or no number; or 0, for a limit.
    """
    seconds = float(instance_of(name, value, int if isinstance(value, int) else float, "a number of seconds"))
    if not 0 <= seconds < math.inf or (is_limit and not seconds):
        raise InvalidArgumentError(
            f"{name} is {seconds:g}; expected {'more than 0' if is_limit else '0 or more'} seconds"
        )
    return seconds
