"""The runtime as a service. Nothing here is imported by `import trip_rt`; it needs the extra `trip-rt[serve]`."""
