"""What the package costs, how exact it is and what it is good for: `python -m benchmarks.<name>` measures each."""
