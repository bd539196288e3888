"""Runnable experiments: `python -m recipes.train` trains, tests and draws one of the configs in `conf/`.

They are part of the repository and of no wheel: clone it and `pip install -e ".[recipes]"`.
"""
