"""The denoising loop and what its steps are made of: schedule, solvers, steps."""
