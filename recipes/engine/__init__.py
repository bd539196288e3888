"""Where work is done: in processes of this machine, or on a Ray cluster.

An engine takes tasks, a name and a function with its argument each, and gives back what came of them. One that
fails, or whose process dies, costs the others nothing.
"""

from __future__ import annotations

from recipes.engine.cluster import RayEngine
from recipes.engine.local import LocalEngine
from recipes.engine.task import Engine, Outcome

__all__ = ["Engine", "LocalEngine", "Outcome", "RayEngine"]
