"""Runnable experiments: `python -m recipes.train` trains, tests and draws one of the configs in `conf/`.

They are part of the repository and of no wheel: clone it and `pip install -e ".[recipes]"`.
"""

import sys
from importlib.util import find_spec

# What every recipe needs, matplotlib among it: a picture is drawn when all else is done.
_missing = [name for name in ("lightning", "hydra", "rich", "filelock", "matplotlib") if find_spec(name) is None]
if _missing:
    _message = f"the recipes need {', '.join(_missing)}: pip install --editable '.[recipes]'"
    if sys.argv[0] == "-m":  # python -m recipes.train, which has no traceback for what a user can mend
        print(_message, file=sys.stderr)
        sys.exit(2)
    raise ImportError(_message)
