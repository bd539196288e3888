"""What the metrics of a layer say, tested where the answer is known: `python -m benchmarks.diagnosis`."""
