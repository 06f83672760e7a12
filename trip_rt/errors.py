"""The one exception a person, not a programmer, causes."""


class InputError(ValueError):
    """Something given from outside is unusable; the message says what was found, what was expected and what to do.

    Commands print it as one line and exit with code 2.
    """
