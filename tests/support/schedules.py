"""Schedules to try, and diffusers' scheduler of one."""

import dataclasses

from diffusers import DDIMScheduler

from trip_reference.presets import DEMO, TRIP_256


def ddim_scheduler(config):
    return DDIMScheduler(**dataclasses.asdict(config), set_alpha_to_one=True, clip_sample=False)


SCHEDULES = [
    dataclasses.replace(base, timestep_spacing=spacing, steps_offset=offset)
    for base in (DEMO.trip.schedule, TRIP_256.trip.schedule)
    for spacing, offset in (("leading", 0), ("leading", 1), ("trailing", 0))
]
