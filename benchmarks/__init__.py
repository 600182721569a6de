"""Benchmarks: what this project's speed and memory are, beside what one would run instead.

`python -m benchmarks` (or `make bench`) takes every figure as pairs and prints one table;
`pytest benchmarks/` runs the same cases under pytest-benchmark.
"""
