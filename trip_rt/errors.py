"""What a person, not a programmer, got wrong, and how to say so in one line."""


class InputError(ValueError):
    """Something given from outside is unusable; the message says what was found, what was expected and what to do.

    Commands print it as one line and exit with code 2.
    """


class EngineError(RuntimeError):
    """An engine gave what no engine should, or failed while it ran; commands print it as one line and exit
    with code 1."""


def printable(text: str) -> str:
    """`text` as one line: whatever would break or garble a terminal line (newlines, control codes, undecodable bytes)
    becomes `?`."""
    return "".join(c if c.isprintable() else "?" for c in text)


def one_line(text: object, most: int = 200) -> str:
    """What a library said, or an error of its, as one short line."""
    return printable(" ".join(str(text).split()))[:most]
