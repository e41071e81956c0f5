"""Benchmarks: they measure the other rooms from outside, as `python -m bench.NAME`. Nothing imports them."""
