"""Checkpoints that come with code of their own, translated at loading into transformers' classes; none of it is run."""
