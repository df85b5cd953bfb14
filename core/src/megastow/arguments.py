"""Checks of what callers hand in, before anything is done: each gives the value back, or says what is wrong with it."""

from __future__ import annotations

import math
import numbers
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
    """A time in seconds; for ever (infinite) only where it is no limit.

    Args:
        name: of the argument.
        value: what was given.
        is_limit: whether something is to be done in that time, so that none at all would be too little.

    Raises:
        InvalidTypeError: it is no number.
        InvalidArgumentError: it is negative, or no number; or 0 or infinite, for a limit.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InvalidTypeError(f"{name} is a {type(value).__qualname__}; expected a number of seconds")
    seconds = float(value)
    if not seconds >= 0 or (is_limit and not 0 < seconds < math.inf):
        expected = "more than 0 seconds, and not for ever" if is_limit else "0 or more seconds"
        raise InvalidArgumentError(f"{name} is {seconds:g}; expected {expected}")
    return seconds
