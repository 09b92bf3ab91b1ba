"""Cats versus dogs as a distributed batch classification job."""

__version__ = "0.2.0"
