"""TRIP's own operations, each beside its plain-torch reference."""
