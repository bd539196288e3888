"""Why embedding and head of a language model gain from a larger learning rate: `python -m benchmarks.cause`."""
