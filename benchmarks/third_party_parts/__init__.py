"""What `benchmarks/third_party.py` is made of."""
