"""A stack of matrices becomes windows, eigenvalues, a power-law fit and at last the record of a layer."""
