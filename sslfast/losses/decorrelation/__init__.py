"""Losses that decorrelate features: sums of second moments (:mod:`sslfast.ops.second_moment`)."""
