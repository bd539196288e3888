"""Import paths of earlier versions: `import farms_tb.plots` gives `farms_tb.viewing.plots`, the same module."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module, util
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

MOVED = {
    "balance": "balancing.balancer",
    "callback": "training.lightning",
    "checkpoint": "weights.files",
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
"""Old to new paths, both relative to `farms_tb`."""


class MovedModules(MetaPathFinder, InspectLoader):
    """Finds modules by the paths that they had before version 0.2."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for an old path, None for every other one."""
        package, _, name = fullname.partition(".")
        if package != "farms_tb" or name not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=name in ("page", "plots"))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the new path, so that classes exist once and `isinstance` holds."""
        module = import_module(self._new_name(spec.name))
        self._own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its own spec back, which the import system has just replaced; it has run already."""
        module.__spec__ = self._own_spec

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the code of the new path, for `python -m farms_tb.wandb_report`."""
        spec = util.find_spec(self._new_name(fullname))
        assert spec is not None
        assert isinstance(spec.loader, InspectLoader)
        return spec.loader.get_code(spec.name)

    def get_source(self, fullname: str) -> str | None:
        """Return no source: the new path has it."""
        return None

    def is_package(self, fullname: str) -> bool:
        """Tell whether the old path was a package."""
        return fullname.removeprefix("farms_tb.") in ("page", "plots")

    @staticmethod
    def _new_name(fullname: str) -> str:
        return f"farms_tb.{MOVED[fullname.removeprefix('farms_tb.')]}"
