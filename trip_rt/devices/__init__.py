"""Where the loop's tensors live: the host's memory or a GPU's, behind one interface."""

from __future__ import annotations

from trip_rt.devices.base import Buffer, Device, Kind, ReadBack, Work

__all__ = ["Buffer", "Device", "Kind", "ReadBack", "Work", "open_device"]


def open_device(kind: Kind) -> Device:
    """The host, or the GPU in use; InputError where there is no GPU that can be used."""
    if kind == "cuda":
        from trip_rt.devices.cuda import CudaDevice

        return CudaDevice()
    from trip_rt.devices.host import HostDevice

    return HostDevice()
