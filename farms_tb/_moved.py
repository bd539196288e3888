"""Import paths of earlier versions: `import farms_tb.plots` gives `farms_tb.viewing.plots`, the same module.

Version 0.2 moved the modules into subpackages. Scripts and pickled objects of earlier versions name the old paths,
so an import hook, which `farms_tb/__init__.py` installs, finds the modules by both. Nothing is imported before it
is asked for, and no module exists twice: `isinstance` holds between the two paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, util
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

MOVED = {
    "balance": "balancing.loop",
    "callback": "training.lightning",
    "checkpoint": "analysis",
    "densities": "viewing.densities",
    "huggingface": "training.huggingface",
    "layers": "weights.layers",
    "layerwise_step": "balancing.layerwise_step",
    "loggers": "training.sinks",
    "logs": "training.metrics",
    "matrices": "weights.matrices",
    "page": "viewing.page",
    "plots": "viewing.plots",
    "plots.curves": "viewing.plots.curves",
    "plots.everything": "viewing.plots.everything",
    "plots.layers": "viewing.plots.layers",
    "plots.style": "viewing.plots.style",
    "power_law": "spectra.power_law",
    "run_folder": "viewing.run_folder",
    "schedule": "training.schedule",
    "solvers": "spectra.solvers",
    "temperature": "balancing.ratio_maps",
    "wandb_report": "training.wandb_workspace",
    "windows": "spectra.windows",
}
"""Old to new paths, both relative to `farms_tb`.

Where the contents of a module were divided, the new path is the one from which the old public names can be
imported.
"""

PACKAGES = ("page", "plots")
"""The old paths with modules below them."""


class MovedModules(MetaPathFinder, Loader):
    """Finds and loads modules by the paths that they had before version 0.2, for `sys.meta_path`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old path, None for every other one.

        Args:
            fullname: dotted path of the module, `farms_tb.plots` for example.
            path: where the import system would search; not needed here.
            target: a module that is reloaded; not needed here.
        """
        package, _, name = fullname.partition(".")
        if package != "farms_tb" or name not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=name in PACKAGES)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the new path, imported if need be, in the place of a new one."""
        module = import_module(_new_name(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back.

        The import system has just replaced it by that of the old path. There is nothing to execute: the module
        ran when it was imported by its new path.
        """
        old_path = module.__spec__
        assert old_path is not None
        module.__spec__ = old_path.loader_state

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the code of the module, which `python -m farms_tb.wandb_report` runs."""
        spec = util.find_spec(_new_name(fullname))
        assert spec is not None
        assert isinstance(spec.loader, InspectLoader)
        return spec.loader.get_code(spec.name)


def _new_name(fullname: str) -> str:
    """Return the dotted path of a module now, given the one it had before."""
    return f"farms_tb.{MOVED[fullname.removeprefix('farms_tb.')]}"
