"""trip-rt: animates a picture as a sentence says, with engines built from a TRIP model.

from trip_rt import Animator
animator = Animator("bundle")
clip = animator("photo.png", "a red ball rolls to the right", seed=7)
clip.save("clip.mp4")
"""

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
