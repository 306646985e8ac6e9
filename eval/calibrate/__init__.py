"""Settings found by measuring: thresholds for a wanted number of tokens, and the attention heads of YOPO."""
