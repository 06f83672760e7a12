"""trip-rt: animates a picture as a sentence says, with engines built from a TRIP model.

from trip_rt import Animator
animator = Animator("bundle")
clip = animator("photo.png", "a red ball rolls to the right", seed=7)
clip.save("clip.mp4")
"""

import importlib

TYPE_CHECKING = False  # typing's own takes longer to import than all that a command begins with
if TYPE_CHECKING:
    from trip_rt.animator import Animation, Animator
    from trip_rt.backends import EngineOptions
    from trip_rt.errors import EngineError, InputError
    from trip_rt.settings import SPEEDS, Settings, Speed

__version__ = "0.1.0"
__all__ = [
    "SPEEDS",
    "Animation",
    "Animator",
    "EngineError",
    "EngineOptions",
    "InputError",
    "Settings",
    "Speed",
    "__version__",
]

# A name is imported when it is first asked for, so that a command that begins answers Ctrl-C at once (launch.py).
_HOMES = {
    "SPEEDS": "settings",
    "Animation": "animator",
    "Animator": "animator",
    "EngineError": "errors",
    "EngineOptions": "backends",
    "InputError": "errors",
    "Settings": "settings",
    "Speed": "settings",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
