"""Pictures from words, by diffusers' own pipelines: what trip-imagine animates."""
