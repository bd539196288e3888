"""A model or a file becomes named stacks of matrices `(K, R, C)`, the first step of the method."""
