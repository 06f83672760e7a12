"""Evaluation: what the paper measures, and what the demo world lets one judge."""
