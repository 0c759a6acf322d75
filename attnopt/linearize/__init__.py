"""Softmax attention made linear: feature maps, how they are fitted, and the rewrite."""
