"""The target of a TensorRT plan."""

from trip_rt.backends.tensorrt import PLATFORM

TARGET = {"library": "tensorrt", "version": "11.4.0.106", "compute_capabilities": "9.0", "platform": PLATFORM}
RTX_TARGET = {
    "library": "tensorrt_rtx",
    "version": "1.7.1.116",
    "compute_capabilities": "8.9 12.0",
    "platform": PLATFORM,
    "plan": "portable",
}
