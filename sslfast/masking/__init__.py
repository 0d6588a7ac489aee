"""Masks of patches and of words, and what is computed from the kept or the masked ones alone."""

__all__: list[str] = []
