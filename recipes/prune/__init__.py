"""Prune a model by several allocations of sparsity and compare what it still can: `python -m recipes.prune`."""
