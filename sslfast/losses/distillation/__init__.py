"""Losses of a student against a teacher: prototypes and their assignments, cosine, neighbours, Gram matrices."""
