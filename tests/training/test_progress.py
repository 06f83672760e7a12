"""Without a terminal, slow work says how far it is: not at all seldom, and not at every step."""

import pytest

from trip_reference import progress
from trip_reference.progress import EVERY, Progress, shown_progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_first_and_last_and_every_ten_seconds_between(clock, capsys):
    with Progress("all", 100, "step", done=20) as shown:
        for _ in range(80):
            clock[0] += 1
            shown.advance()
            if shown.done % 4 == 0:
                shown.say(f"loss {shown.done / 100}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "all: step 24 of 100, loss 0.24, 1:16 left"
    assert lines[1] == "all: step 36 of 100, loss 0.36, 1:04 left"  # the first that is 10 s after the one before
    assert lines[-1] == "all: step 100 of 100, loss 1.0, 0:00 left"
    assert len(lines) == 1 + 76 // 12 + 1


def test_items_are_counted_and_a_long_time_is_in_hours(clock, capsys):
    taken = []
    for item in shown_progress("abc", 3, "encode clips", "clip"):
        taken.append(item)
        clock[0] += EVERY * 400
    assert taken == ["a", "b", "c"]
    assert capsys.readouterr().err.splitlines() == [
        "encode clips: clip 1 of 3, 2:13:20 left",
        "encode clips: clip 2 of 3, 1:06:40 left",
        "encode clips: clip 3 of 3, 0:00 left",
    ]


def test_one_process_alone_speaks_and_a_terminal_has_its_bar(clock, capsys, monkeypatch):
    with Progress("all", 2, "step", shown=False) as silent:
        silent.advance()
        silent.say("loss 1")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("all", 2, "step") as shown:
        shown.advance()
        shown.say("loss 1")
    error = capsys.readouterr().err
    assert "50%" in error and "\r" in error
    assert "step 1 of 2" not in error
