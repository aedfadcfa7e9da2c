"""fasttax's benchmarks: `python -m bench` (or `make bench`) measures, writes bench/results, and
renews README's table.
"""
