"""Clips of another length or size than a model was made for: its networks take any that their strides divide."""

from __future__ import annotations

import dataclasses

from trip_rt.config import TripConfig
from trip_rt.errors import InputError


def reshaped(
    trip: TripConfig,
    latent_multiple: int,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
) -> TripConfig:
    """`trip` for clips of that length and size, as it is where they are None or 0; the sides of the latents must be
    multiples of `latent_multiple`. Raises InputError for clips that the model cannot have."""
    given = {"num_frames": num_frames, "height": height, "width": width}
    trip = dataclasses.replace(trip, **{name: value for name, value in given.items() if value})
    if trip.num_frames < 2:
        raise InputError(f"frames: found {trip.num_frames}, expected at least 2")
    step = trip.vae_scale_factor * latent_multiple
    if trip.height % step or trip.width % step:
        raise InputError(f"size: found {trip.width}x{trip.height}, expected multiples of {step}")
    return trip
