"""What must be right about the settings before anything is made, and how their parts are built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from recipes.errors import RecipeError

__all__ = ["ARMS", "build", "check_combination", "check_config", "check_resumed_config", "choice"]

ARMS = ("farms", "full", "off", "monitor", "noise_aware", "placebo")
SECTIONS = (
    *("name", "seed", "seeds", "threads", "measuring_threads", "ckpt_path"),
    *("arms", "arm", "lr", "farms", "task"),
    *("data", "model", "optimizer", "scheduler", "callbacks", "logger", "trainer", "paths"),
)


def choice(cfg: DictConfig, group: str) -> str:
    """Return `group=name` as the user chose it, or the class it stands for where Hydra did not compose `cfg`."""
    if HydraConfig.initialized():
        return f"{group}={HydraConfig.get().runtime.choices.get(group)}"
    return f"{group}={OmegaConf.select(cfg, f'{group}._target_')}"


def check_config(cfg: DictConfig) -> None:
    """Check what can be checked without building or reading anything.

    Raises:
        RecipeError: A section is missing or unknown, a value can't be resolved, the arm's name is not one of
            `ARMS` or not the one chosen, the checkpoint to resume from is not there, or model and data do not go
            together.
    """
    unknown = sorted(set(map(str, cfg)) - set(SECTIONS))
    if unknown:
        raise RecipeError(
            f"unknown settings at the top level: {', '.join(unknown)}; known are {', '.join(SECTIONS)}"
        )
    missing = sorted(set(SECTIONS) - set(map(str, cfg)))
    if missing:
        raise RecipeError(f"missing settings at the top level: {', '.join(missing)}; conf/train.yaml shows them")
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"the settings do not resolve: {error}") from error
    _check_arm(cfg)
    if cfg.threads is not None and (not isinstance(cfg.threads, int) or cfg.threads < 1):
        raise RecipeError(f"threads must be null or a positive number, got {cfg.threads}")
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        raise RecipeError(f"ckpt_path={cfg.ckpt_path} is not a file; a run keeps its own in checkpoints/last.ckpt")
    _check_kinds(cfg)


def _check_arm(cfg: DictConfig) -> None:
    """Refuse an arm whose name belies its settings."""
    chosen = HydraConfig.get().runtime.choices.get("farms") if HydraConfig.initialized() else cfg.arm
    if cfg.arm not in ARMS or cfg.arm != chosen or (cfg.farms is None) != (cfg.arm == "off"):
        raise RecipeError(
            f"arm={cfg.arm} does not match {choice(cfg, 'farms')}; choose with farms={'|'.join(ARMS)}"
        )


def _check_kinds(cfg: DictConfig) -> None:
    """Refuse a model for images on fields, and the other way round."""
    needs, gives = (getattr(get_class(cfg[part]._target_), "kind", "") for part in ("model", "data"))
    if needs != gives:
        raise RecipeError(
            f"{choice(cfg, 'model')} and {choice(cfg, 'data')} do not go together: the model learns {needs}, "
            f"the data are {gives}. Choose both, or one experiment=..."
        )


def check_combination(cfg: DictConfig, model: Any, data: Any) -> None:
    """Check that model and data fit in what can be changed by hand.

    Raises:
        RecipeError: The network can't take inputs of this shape, the data have another number of classes or of
            channels, or there is nothing to choose the best epoch on.
    """
    classes = getattr(data, "num_classes", cfg.task.out_channels)
    if classes != cfg.task.out_channels:
        raise RecipeError(
            f"task.out_channels={cfg.task.out_channels}, but {choice(cfg, 'data')} has {classes} classes; "
            f"leave it at {classes}"
        )
    if getattr(data, "val_size", 1) == 0 and cfg.task.monitor is not None:
        raise RecipeError(
            f"data.val_size=0 leaves no {cfg.task.monitor} to choose the best epoch by; set task.monitor=null too "
            "(the weights of the last epoch are tested), or hold images out"
        )
    if data.kind == "trajectories":
        channels = (data.history * data.channels, data.channels)
        if channels != (cfg.task.in_channels, cfg.task.out_channels):
            raise RecipeError(
                f"{data.history} frames of {data.channels} channels are mapped to the next one: set "
                f"task.in_channels={channels[0]} task.out_channels={channels[1]}"
            )
    dimension = getattr(model.net, "n_dim", None)  # neuraloperator's
    if dimension is not None and dimension != len(data.sample_shape) - 1:
        raise RecipeError(
            f"{choice(cfg, 'model')} does not fit {choice(cfg, 'data')}: it takes fields in {dimension}D, "
            f"got (channels, *space) {data.sample_shape}"
        )
    check_input = getattr(model.net, "check_input", None)
    if check_input is None:
        return
    shape = data.sample_shape  # a data file that is missing says so itself
    try:
        check_input(shape)
    except ValueError as error:
        raise RecipeError(f"{choice(cfg, 'model')} does not fit {choice(cfg, 'data')}: {error}") from error


def _plain(cfg: Any, section: str) -> Any:
    value = OmegaConf.select(cfg, section)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def check_resumed_config(cfg: DictConfig, saved_file: Path) -> list[str]:
    """Compare the settings with those of the run that is resumed.

    Args:
        cfg: The settings now.
        saved_file: The run folder's `config.yaml`.

    Returns:
        Other sections that differ and that the result depends on, for a note to the user.

    Raises:
        RecipeError: The model or the data differ.
    """
    saved = OmegaConf.load(saved_file)
    changed = [section for section in SECTIONS if _plain(saved, section) != _plain(cfg, section)]
    fatal = [section for section in changed if section in ("model", "data")]
    if fatal:
        raise RecipeError(
            f"ckpt_path={cfg.ckpt_path} comes from a run with another {' and another '.join(fatal)}; "
            f"repeat that run's overrides (its settings are in {saved_file})"
        )
    return [section for section in changed if section not in ("seeds", "ckpt_path", "paths", "trainer")]


def build(cfg: DictConfig, path: str, **extra: Any) -> Any:
    """Instantiate the settings at `path`.

    Args:
        cfg: All settings.
        path: Dotted path, say "logger.wandb".
        extra: More keyword arguments.

    Raises:
        RecipeError: The constructor refuses; the message names the settings and the reason.
    """
    try:
        return instantiate(OmegaConf.select(cfg, path), _convert_="all", **extra)
    except InstantiationException as error:
        reason = error.__cause__ or error
        hint = "; pip install 'farms-tb[recipes]', or logger=csv" if isinstance(reason, ImportError) else ""
        raise RecipeError(f"{path}: {reason}{hint}") from error
