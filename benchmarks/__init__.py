"""Benchmarks: `python -m benchmarks SUITE`. Results and their tables lie in benchmarks/results/."""
