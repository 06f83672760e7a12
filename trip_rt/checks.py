"""Checks of single values that people give: what has the wrong type or lies out of bounds is an InputError. Numbers may
be Python's or numpy's; the plain value comes back."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Sequence
from io import IOBase
from typing import Any

import numpy as np

from trip_rt.errors import InputError, printable


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """`value` as an int from `low` to `high`."""
    if is_whole(value) and low <= int(value) <= high:
        return int(value)
    raise InputError(f"{name}: found {shown(value)}, expected a whole number from {_bound(low)} to {_bound(high)}")


def real_number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a finite float from `low` to `high`."""
    if not is_number(value) or not low <= value <= high:
        raise InputError(f"{name}: found {shown(value)}, expected a number from {low:g} to {high:g}")
    return float(value)


def is_number(value: Any) -> bool:
    """Whether it is a number as people write them: not a truth value, and not complex."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    """Whether it is a whole number and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def one_of(name: str, value: Any, choices: Sequence[str]) -> None:
    """InputError unless `value` is one of these words."""
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{name}: found {shown(value)}, expected {', '.join(choices[:-1])} or {choices[-1]}")


def text(name: str, value: Any) -> str:
    """`value` as a str of characters; bytes of a command line that are no text and half a pair of `\\u` escapes are
    none."""
    if not isinstance(value, str):
        raise InputError(f"{name}: found {shown(value)}, expected text")
    if not is_text(value):
        raise InputError(
            f"{name}: found undecodable characters in {shown(value)}, expected Unicode text; write it as UTF-8"
        )
    return value


def is_text(value: Any) -> bool:
    """Whether it is a str of whole characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def several(name: str, values: Any) -> Sequence[Any]:
    """`values` as something with a length and an order; a text, a path or an open file is one thing."""
    if isinstance(values, np.ndarray):
        values = list(values) if values.ndim else None
    if isinstance(values, Iterable) and not isinstance(values, (str, bytes, os.PathLike, IOBase)):
        return values if isinstance(values, Sequence) else list(values)
    raise InputError(f"{name}: found {shown(values)}, expected a list of them")


def check_array(name: str, value: Any, dtype: str, shape: Sequence[int | None]) -> None:
    """InputError unless `value` is an array of that dtype and shape; None is a side of any length."""
    wanted = f"{dtype} [{', '.join('n' if side is None else str(side) for side in shape)}]"
    if not isinstance(value, np.ndarray):
        raise InputError(f"{name}: found {shown(value)}, expected an array {wanted}")
    fits = value.ndim == len(shape) and all(side in (None, have) for have, side in zip(value.shape, shape, strict=True))
    if value.dtype != dtype or not fits:
        raise InputError(f"{name}: found {value.dtype} {list(value.shape)}, expected {wanted}")


def shown(value: Any) -> str:
    """A value in a message: numbers, words and None as they are written, of other things their type."""
    if value is None or isinstance(value, (bool, str)):
        return excerpt(repr(value))
    if isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational):
        return f"{float(value):g}"
    if isinstance(value, numbers.Integral):
        # Python refuses to write numbers of thousands of digits.
        return str(int(value)) if int(value).bit_length() < 100 else "a number of more than 30 digits"
    return f"a {type(value).__name__}"


def excerpt(words: str) -> str:
    """The beginning of a text, as one line."""
    return printable(words[:48] + "…" if len(words) > 48 else words)


def _bound(value: int) -> str:
    power = math.log2(value + 1) if value > 0 else 0
    return f"2^{power:.0f} − 1" if power >= 32 and value + 1 == 1 << round(power) else str(value)
