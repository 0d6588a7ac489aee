"""Demos: each folder beside ``common`` is one method, run as ``python -m examples.<method>``."""
