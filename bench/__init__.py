"""Benchmarks: `python -m bench` measures, writes bench/results, and renews README's table."""
