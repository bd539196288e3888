"""Records become the learning-rate ratio of each layer, and ratios become the optimizer's step."""
