"""Contrastive losses: log-sum-exp of scaled similarities (:mod:`sslfast.ops.similarity_lse`)."""
