"""What the tests, the demo and the benchmarks run on."""
