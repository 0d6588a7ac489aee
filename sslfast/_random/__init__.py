"""Random numbers that depend on who draws them: Philox, its streams, and the ids of samples."""
