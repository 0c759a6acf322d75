"""Benchmarks of the kernels against what people would run instead, as ratios within one process."""
