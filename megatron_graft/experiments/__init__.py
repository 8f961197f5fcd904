"""Matched arms: one recipient trained with several memories on the same tokens, and what comes of it."""
