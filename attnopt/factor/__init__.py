"""Biases of the scores as further dimensions of query and key, or as lines."""
