"""The target of a TensorRT plan."""

from trip_rt.backends.tensorrt import PLATFORM

TARGET = {"tensorrt": "11.4.0.106", "compute_capability": "9.0", "platform": PLATFORM}
