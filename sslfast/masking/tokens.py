"""Tokens that a mask keeps, and tokens put back in their places."""

from ..ops.gather_tokens import gather_tokens
from ..ops.scatter_tokens import replace_tokens, scatter_tokens

__all__ = ["gather_tokens", "replace_tokens", "scatter_tokens"]
