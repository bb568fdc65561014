"""Tests. None depends on how fast the machine is: what takes time is awaited, and ends when the test lets it."""

PATIENCE = 600.0
"""Seconds after which what is waited for is taken for what never comes: far more than a slow machine needs."""
