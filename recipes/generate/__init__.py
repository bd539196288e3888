"""Made data in PDEBench's HDF5 layout: `python -m recipes.generate darcy` or `cfd1d`."""
