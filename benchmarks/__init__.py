"""What the package costs, measured: one module a subject, run by `python -m benchmarks.<name>`."""
