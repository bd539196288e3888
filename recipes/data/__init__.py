"""Data: Darcy flow made on the spot, PDEBench's files, scikit-learn's digits, the papers' images, and texts."""
