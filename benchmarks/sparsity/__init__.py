"""Allocations of sparsity compared on trained models: `python -m benchmarks.sparsity`."""
