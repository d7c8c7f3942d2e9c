"""The suite's own tests, its negative controls and benchmarks."""
