"""Data: Darcy flow made on the spot, PDEBench's files, scikit-learn's digits, and the papers' image sets."""
