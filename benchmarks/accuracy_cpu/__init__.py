"""The forecast against what real training steps take on the CPU: `python -m benchmarks.accuracy_cpu`."""
