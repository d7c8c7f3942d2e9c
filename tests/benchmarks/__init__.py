"""Benchmarks of the kernels, by pytest-benchmark: `tox run -e bench`."""
