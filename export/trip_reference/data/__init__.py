"""Training data: clips with captions out of folders of videos, shards, or the demo world, and `trip-data`, which looks
after them."""
