"""MustDrop's three stages, each a reducer of its own."""

from mustdrop.stages.decode import OutputAwareCache
from mustdrop.stages.prefill import DualAttentionFilter
from mustdrop.stages.vision import DiverseTokens, KeyTokens, LocalSpatialMerge

__all__ = ["DiverseTokens", "DualAttentionFilter", "KeyTokens", "LocalSpatialMerge", "OutputAwareCache"]
