"""Names with braces and wildcards, as data/{train,val}/shard-{000000..000099}.tar, to names; what would be too many is
refused before it is made."""

from __future__ import annotations

import glob
import math
import os
import re

from trip_rt.errors import InputError, printable

MOST_NAMES = 100_000
MOST_CHARACTERS = 1000
MOST_WILD = 2  # parts of a path with wildcards: each multiplies the folders that are looked into
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_LETTERS = re.compile(r"[A-Za-z]\.\.[A-Za-z]")


def expand(pattern: str) -> list[str]:
    """The names that braces stand for, in order; InputError for a brace without its partner and for too many names."""
    import braceexpand

    where = printable(pattern)[:100]
    if len(pattern) > MOST_CHARACTERS or _at_most(pattern) > MOST_NAMES:
        raise InputError(
            f"{where}: found a pattern of too many names, expected at most {MOST_NAMES} in {MOST_CHARACTERS} characters"
        )
    try:
        os.fsencode(pattern)
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: found half of a surrogate pair, expected whole characters") from error
    if "\0" in pattern:
        raise InputError(f"{where}: found a null byte, expected the name of files")
    try:
        return list(braceexpand.braceexpand(pattern))
    except braceexpand.UnbalancedBracesError as error:
        raise InputError(
            f"{where}: found a brace without its partner, expected a pattern such as data/shard-{{000000..000099}}.tar"
        ) from error


def matching(name: str) -> list[str]:
    """The files that a name with wildcards stands for, in order; the name itself where it has none or no file fits."""
    if not glob.has_magic(name):
        return [name]
    if sum(map(glob.has_magic, name.split("/"))) > MOST_WILD:
        raise InputError(
            f"{printable(name)[:100]}: found wildcards in more than {MOST_WILD} parts of the path, expected them in the"
            " last ones; name the folders"
        )
    return sorted(glob.glob(name)) or [name]


def _at_most(pattern: str) -> int:
    """No fewer than the names that the pattern stands for: a pair of braces multiplies them by its range, or by its
    alternatives."""
    groups, open_groups = [1], [0]
    for sign in re.findall(r"[{},]", pattern):
        if sign == "{":
            open_groups.append(len(groups))
            groups.append(1)
        elif sign == "}" and len(open_groups) > 1:
            open_groups.pop()
        elif sign == ",":
            groups[open_groups[-1]] += 1
    ranges = [abs(int(last) - int(first)) + 1 for first, last in _RANGE.findall(pattern)]
    return math.prod(groups[1:]) * math.prod(ranges) * 52 ** len(_LETTERS.findall(pattern))
