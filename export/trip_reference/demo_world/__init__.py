"""The demo world: its scenes and their pictures, its sentences, its clips as data, and who judges clips made of it."""
