"""What `make gpu` runs, by run.py."""
