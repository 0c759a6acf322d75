"""Sparse attention as an approximate rewrite: windows with sinks, and blocks that the inputs choose."""
