"""Demos: each folder beside ``common`` is one, run as ``python -m examples.<folder>``."""
