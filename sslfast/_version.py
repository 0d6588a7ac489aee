"""The one place of the version: the build and every part of the package read it here."""

__version__ = "0.1.0"
