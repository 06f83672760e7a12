"""Fuzz tests: thousands of damaged and hostile inputs, each of which must end soon, in little memory and in one line.

    @fuzz_area("annotations", quick=30, full=1500)
    def test_annotations(fuzz, tmp_path):
        def read(data):  # an input that is accepted must be as good as a valid one: asserted here
            (tmp_path / "annotations.json").write_bytes(data)
            assert all(entry.text for entry in read_annotations(tmp_path))

        fuzz(mutated_json(VALID), read, folder=tmp_path)

`make test` runs the quick sample, `pytest -m slow tests/fuzz` the full number and prints a table of the areas.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import math
import os
import signal
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from trip_rt.errors import InputError
from trip_rt.process_memory import forget_peak, peak_memory_mb

SECONDS = 10  # for one input
MEGABYTES = 1000  # that one input may add to what the process holds
LEFTOVERS = (".trip-", ".saving-", ".exporting-", ".finished-")
PROPERTY = "fuzz"  # under which a test's counts reach the summary, from xdist's workers too


def fuzz_area(area: str, quick: int, full: int) -> Callable[[Any], Any]:
    """A test of that area, which takes the fixture `fuzz` (tests/conftest.py): once with `quick` inputs, once, as a
    slow test, with `full`."""
    sizes = [pytest.param((area, quick), id="quick"), pytest.param((area, full), id="full", marks=pytest.mark.slow)]
    return pytest.mark.parametrize("fuzz", sizes, indirect=True)


class Fuzz:
    """Runs inputs and counts them; the fixture `fuzz`."""

    def __init__(self, area: str, inputs: int):
        self.area, self.inputs = area, inputs
        self.counts = {"area": area, "inputs": 0, "accepted": 0, "refused": 0, "seconds": 0.0, "slowest": 0.0}

    def __call__(
        self,
        strategy: st.SearchStrategy[Any],
        one: Callable[[Any], None],
        refuses: type[Exception] | tuple[type[Exception], ...] = InputError,
        folder: Path | None = None,
        share: float = 1.0,
    ) -> None:
        """`one` of that `share` of the area's inputs, drawn from `strategy` by a fixed seed.

        It returns where the input is accepted, and has checked then that this was right; it raises one of `refuses`,
        with a message of one printable line, or else the test fails. So it does where an input takes too long, too much
        memory, or leaves a part of a file in `folder`.
        """

        @settings(
            max_examples=math.ceil(self.inputs * share),
            derandomize=True,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @seed(zlib.crc32(self.area.encode()))
        @given(strategy)
        def run(value: Any) -> None:
            before = _leftovers(folder)
            forget_peak()
            held, began = peak_memory_mb(), time.monotonic()
            try:
                with _alarm():
                    one(value)
                self.counts["accepted"] += 1
            except refuses as error:
                self.counts["refused"] += 1
                message = str(error)
                assert message and message.isprintable(), f"found {message!r}, expected one printable line"
            took, grown = time.monotonic() - began, peak_memory_mb() - held
            self.counts["inputs"] += 1
            self.counts["seconds"] += took
            self.counts["slowest"] = max(self.counts["slowest"], took)
            assert took < SECONDS, f"took {took:.1f} s"
            assert grown < MEGABYTES, f"took {grown:.0f} MB"
            left = _leftovers(folder) - before
            assert not left, f"left {left}"

        run()


class TooLong(Exception):
    pass


class _alarm:
    """TooLong where the block takes too long, and a traceback on stderr where it does not even hear that."""

    def __enter__(self) -> None:
        def ring(number: int, frame: object) -> None:
            raise TooLong(f"took more than {SECONDS} s")

        self._before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        faulthandler.dump_traceback_later(2 * SECONDS, exit=False)

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)


def _leftovers(folder: Path | None) -> set[str]:
    if folder is None:
        return set()
    return {
        os.path.join(parent, name)
        for parent, folders, files in os.walk(folder)
        for name in (*folders, *files)
        if name.startswith(LEFTOVERS)
    }


def table(counts: Sequence[dict[str, Any]]) -> list[str]:
    """What the areas took in, for the end of a run."""
    rows: dict[str, dict[str, Any]] = {}
    for one in counts:
        row = rows.setdefault(one["area"], dict.fromkeys(one, 0) | {"area": one["area"]})
        for name in ("inputs", "accepted", "refused", "seconds"):
            row[name] += one[name]
        row["slowest"] = max(row["slowest"], one["slowest"])
    total = {name: sum(row[name] for row in rows.values()) for name in ("inputs", "accepted", "refused", "seconds")}
    total |= {"area": "all", "slowest": max(row["slowest"] for row in rows.values())}
    head = f"{'area':<20}{'inputs':>8}{'accepted':>10}{'refused':>9}{'seconds':>9}{'slowest':>9}"
    return [
        head,
        *(
            f"{row['area']:<20}{row['inputs']:>8}{row['accepted']:>10}{row['refused']:>9}{row['seconds']:>9.1f}"
            f"{row['slowest']:>9.2f}"
            for row in (*sorted(rows.values(), key=lambda row: row["area"]), total)
        ),
    ]


# Values that no valid file holds where they are put. The marked ones are written as JSON that json.dumps cannot write.
_DEEP, _DIGITS, _OVERFLOW = "@deep@", "@digits@", "@overflow@"
HOSTILE: list[Any] = [
    -1,
    0,
    1,
    3,
    1.5,
    2**31,
    2**40,
    2**63,
    2**64,
    -(2**63),
    1e-300,
    1e308,
    -1e308,
    math.nan,
    math.inf,
    -math.inf,
    _DIGITS,
    _OVERFLOW,
    None,
    True,
    False,
    "",
    "x",
    "1",
    "x" * 5000,
    "../../etc/passwd",
    "/dev/zero",
    "a\0b",
    "\ud800",
    "line\nbreak\x1b[31m",
    "\N{RIGHT-TO-LEFT OVERRIDE}",
    [],
    [[]],
    [1, 2, 3],
    ["x"] * 1000,
    _DEEP,
    {},
    {"x": {"y": None}},
]
_NAMES = ["x", "", "a\nb", "\ud800", "__class__", "auto_map", "_class_name"]
hostile = st.sampled_from(HOSTILE).map(copy.deepcopy)


@st.composite
def hostile_json(draw: st.DrawFn, values: Sequence[Any]) -> bytes:
    """The text of one of `values`, JSON values, with one to three of its values replaced by hostile ones, dropped,
    renamed, repeated or swapped."""
    root = {"": json.loads(json.dumps(draw(st.sampled_from(values))))}
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(root))
        holder, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "swap"]))
        if how == "replace" or holder is root:
            holder[key] = draw(hostile)
        elif how == "drop":
            del holder[key]
        elif how == "add" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", "", "a\nb", "\ud800", "__class__", "auto_map", "_class_name"]))] = draw(
                hostile
            )
        elif how == "add":
            holder.extend([holder[key]] * draw(st.sampled_from([1, 100])))
        else:
            other, name = draw(st.sampled_from(places))
            # Copies: one of the two may lie inside of the other.
            holder[key], other[name] = copy.deepcopy(other[name]), copy.deepcopy(holder[key])
    return json_text(root[""]).encode()


def json_text(value: Any) -> str:
    """JSON, as far as it can be, with the marked hostile values in full."""
    text = json.dumps(value)
    for mark, written in ((_DEEP, "[" * 20000 + "]" * 20000), (_DIGITS, "9" * 5000), (_OVERFLOW, "1e999")):
        text = text.replace(json.dumps(mark), written)
    return text


def _places(value: Any) -> Any:
    """(container, key) of all that is inside of `value`."""
    for key in value if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


_WORDS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**40, 2**63 - 1, 2**64 - 1]


@st.composite
def damaged(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of `valid`, with one to four bits flipped, numbers overwritten, pieces cut out, repeated or zeroed, or its
    end cut off."""
    data = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        # Half of the damage is done to the beginning, where headers are.
        place = draw(st.integers(0, len(data) - 1) | st.integers(0, min(len(data), 512) - 1))
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(["flip", "byte", "word", "word", "cut", "repeat", "zero", "end"])):
            case "flip":
                data[place] ^= 1 << draw(st.integers(0, 7))
            case "byte":
                data[place] = draw(st.integers(0, 255))
            case "word":
                size = draw(st.sampled_from([2, 4, 8]))
                word = draw(st.sampled_from(_WORDS)) % 256**size
                data[place : place + size] = word.to_bytes(size, draw(st.sampled_from(["big", "little"])))
            case "cut":
                del data[place : place + length]
            case "repeat":
                data[place:place] = data[place : place + length] * draw(st.sampled_from([1, 1, 50]))
            case "zero":
                data[place : place + length] = bytes(length)
            case "end":
                del data[place:]
    return bytes(data)


def mutated_json(values: Sequence[Any]) -> st.SearchStrategy[bytes]:
    """Mostly JSON with hostile values in it, sometimes damaged text."""
    return hostile_json(values) | hostile_json(values) | damaged([json_text(value).encode() for value in values])
