"""Benchmarks: `python -m bench` measures, writes bench/results, and renews the tables."""
