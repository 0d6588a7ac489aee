"""Losses of what was masked: patches, features, tokens."""
