"""Runnable experiments: `python -m recipes.train` trains, tests and draws one of the configs in `conf/`."""
