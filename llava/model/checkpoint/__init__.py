"""Every checkpoint that can be loaded, described from the files that are there; see docs/checkpoints.md."""

from llava.model.checkpoint.describe import Checkpoint, describe_checkpoint

__all__ = ["Checkpoint", "describe_checkpoint"]
