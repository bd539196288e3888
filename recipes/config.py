"""What must be right about the settings before anything is made, and how their parts are built.

The checks run in the order of what they cost: names, values and classes first (`check_config`), then the parts
once they are built (`check_combination`), all of it before data are made or a network is trained. Each message
names the setting to change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from farms_tb.presets import PRESETS
from recipes.errors import RecipeError
from recipes.extras import remedy
from recipes.old_names import current_settings
from recipes.optimizers import OptimizerFactory, make_optimizer, takes_network
from recipes.values import check_name, check_numbers

__all__ = [
    "ARMS",
    "CONFIG_DIR",
    "SECTIONS",
    "build",
    "build_balancer",
    "check_arm",
    "check_combination",
    "check_config",
    "check_optimizer",
    "check_resumed_config",
    "check_values",
    "choice",
    "plain",
]

CONFIG_DIR = str(Path(__file__).resolve().parents[1] / "conf")
ARMS = tuple(sorted(file.stem for file in Path(CONFIG_DIR, "balancing").glob("[!_]*.yaml")))
"""What `balancing=` can choose."""
_RESUMED_AS_THEY_WERE = (
    *("lr", "model", "data", "optimizer", "scheduler"),
    *(f"training.{name}" for name in ("learning_rate", "weight_decay", "optim")),
    *(f"training.adam_{name}" for name in ("beta1", "beta2", "epsilon")),
)
"""Settings whose values a checkpoint brings back, by training itself or by what they are applied to."""
_FREE_AT_RESUME = ("seeds", "ckpt_path", "paths", "trainer", "training.output_dir")
SECTIONS = (
    *("name", "seed", "seeds", "threads", "measuring_threads", "ckpt_path"),
    *("arms", "arm", "lr", "balancing", "task"),
    *("data", "model", "optimizer", "scheduler", "callbacks", "logger", "trainer", "paths"),
)


def choice(cfg: DictConfig, group: str) -> str:
    """Return `group=name` as the user chose it, or the class it stands for where Hydra did not compose `cfg`."""
    if HydraConfig.initialized():
        return f"{group}={HydraConfig.get().runtime.choices.get(group)}"
    return f"{group}={OmegaConf.select(cfg, f'{group}._target_')}"


def check_config(cfg: DictConfig) -> None:
    """Check what can be checked without building or reading anything.

    Args:
        cfg: The composed settings.

    Raises:
        RecipeError: A section is missing or unknown, a value can't be resolved, the fraction of the samples has
            no published numbers, the arm's name is not the one chosen, the checkpoint to resume from is not
            there, or model and data do not go together.
    """
    _check_sections(cfg)
    _check_fraction(cfg)
    check_values(cfg)
    if cfg.ckpt_path is not None and not Path(cfg.ckpt_path).is_file():
        raise RecipeError(f"ckpt_path={cfg.ckpt_path} is not a file; a run keeps its own in checkpoints/last.ckpt")
    _check_kinds(cfg)


def check_values(cfg: DictConfig) -> None:
    """Check the values that the settings of all programs have.

    Args:
        cfg: The composed settings.

    Raises:
        RecipeError: A value is missing or does not resolve, the arm's name is not the one chosen, a number is none
            that can work, or the name is none of a folder.
    """
    try:
        OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise RecipeError(f"the settings do not resolve: {error}") from error
    check_arm(cfg)
    check_name(cfg.name)
    check_numbers(cfg)


def _check_fraction(cfg: DictConfig) -> None:
    """Refuse a fraction of the training samples whose learning rate and decay the experiment does not have."""
    regimes = cfg.arms.get("regime_by_fraction")
    fraction = OmegaConf.select(cfg, "data.fraction")
    if regimes is None or str(fraction) in regimes:
        return
    raise RecipeError(
        f"data.fraction={fraction}: learning rate and weight decay are published for {', '.join(regimes)} alone. "
        f"Write one of these, or give numbers of yours: "
        f"'+arms.regime_by_fraction={{{fraction}:{{lr:1e-2,weight_decay:1e-3}}}}'"
    )


def _check_sections(cfg: DictConfig) -> None:
    """Refuse settings at the top level that nothing reads, and the lack of those that are needed."""
    known = set(SECTIONS)
    found = set(map(str, cfg))
    unknown = sorted(found - known)
    if "training" in unknown:
        raise RecipeError(f"experiment={cfg.name} is for python -m recipes.finetune")
    if unknown:
        raise RecipeError(
            f"unknown settings at the top level: {', '.join(unknown)}; known are {', '.join(SECTIONS)}"
        )
    missing = sorted(known - found)
    if missing:
        raise RecipeError(
            f"missing settings at the top level: {', '.join(missing)}; conf/train.yaml shows them, and "
            "the files in conf/data those of task"
        )


def check_arm(cfg: DictConfig) -> None:
    """Refuse an arm whose name does not match its settings.

    The arm is named three times: as `balancing=` on the command line, in the chosen file and at the top level.
    And only the arm `off` has no callback.

    Args:
        cfg: The composed settings.

    Raises:
        RecipeError: The names differ, or the arm has a callback and should have none.
    """
    names = {cfg.arm, cfg.balancing.get("arm")}
    if HydraConfig.initialized():
        names.add(HydraConfig.get().runtime.choices.get("balancing"))
    has_callback = cfg.balancing.get("_target_") is not None
    should_have_callback = cfg.arm != "off"
    if len(names) > 1 or has_callback != should_have_callback:
        raise RecipeError(
            f"arm={cfg.arm} does not match {choice(cfg, 'balancing')}; leave arm alone and choose with "
            f"balancing={'|'.join(ARMS)}"
        )


def _check_kinds(cfg: DictConfig) -> None:
    """Refuse a model for images on fields, and the other way round, where both say what they are for."""
    needs = getattr(_class_of(cfg, "model"), "kind", None)
    gives = getattr(_class_of(cfg, "data"), "kind", None)
    if needs is None or gives is None or needs == gives:
        return
    raise RecipeError(
        f"{choice(cfg, 'model')} and {choice(cfg, 'data')} do not go together: the model learns {needs}, "
        f"the data are {gives}. Choose both, or one experiment=..."
    )


def _class_of(cfg: DictConfig, part: str) -> Any:
    """Return what `_target_` names.

    Raises:
        RecipeError: There is no such thing, or it can't be imported.
    """
    section = cfg[part]
    target = section.get("_target_") if OmegaConf.is_dict(section) else None
    if target is None:
        raise RecipeError(f"{choice(cfg, part)} needs a _target_, the class to build")
    try:
        return get_object(target)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise RecipeError(
            f"{choice(cfg, part)}: _target_ {target} can't be imported ({error}){remedy(error)}"
        ) from error


def check_combination(cfg: DictConfig, model: Any, data: Any) -> None:
    """Check that model and data fit in what can be changed by hand.

    Models and data of the user's own are checked by what they tell: `num_classes`, `val_size`, `kind`,
    `sample_shape` and, of trajectories, `history` with `channels` of the data, `net.n_dim` and `net.check_input`
    of the model, each where it is there.

    Args:
        cfg: The composed settings.
        model: The model.
        data: The data; nothing is loaded yet.

    Raises:
        RecipeError: The network can't take inputs of this shape, the data have another number of classes or of
            channels, or there is nothing to choose the best epoch by.
    """
    _check_scores(cfg, data)
    _check_monitor(cfg, getattr(model, "scores", None))
    if getattr(data, "kind", None) == "trajectories":
        _check_channels(cfg, getattr(data, "history", None), getattr(data, "channels", None))
    _check_network(cfg, getattr(model, "net", None), data)


def check_optimizer(cfg: DictConfig, model: Any, factory: OptimizerFactory) -> None:
    """Try to make an optimizer that chooses by layer: it may be unable to train the network.

    Args:
        cfg: The composed settings.
        model: The model.
        factory: Makes the optimizer. Those that take the parameters alone are not tried.

    Raises:
        RecipeError: The optimizer can't train this network, refuses its settings, or its package is missing.
    """
    if not takes_network(factory):
        return
    try:
        make_optimizer(factory, getattr(model, "net", model))
    except RecipeError:
        raise
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{choice(cfg, 'optimizer')}: {error}") from error


def _check_scores(cfg: DictConfig, data: Any) -> None:
    """Check that there are as many outputs as classes, and validation data to choose the best epoch on."""
    channels = cfg.task.get("out_channels")
    classes = getattr(data, "num_classes", channels)
    if classes != channels:
        raise RecipeError(
            f"task.out_channels={channels}, but {choice(cfg, 'data')} has {classes} classes; leave it at {classes}"
        )
    nothing_held_out = getattr(data, "val_size", 1) == 0
    if nothing_held_out and cfg.task.monitor is not None:
        raise RecipeError(
            f"data.val_size=0 leaves no {cfg.task.monitor} to choose the best epoch by; set task.monitor=null too "
            "(the weights of the last epoch are tested), or hold images out"
        )


def _check_monitor(cfg: DictConfig, scores: Sequence[str] | None) -> None:
    """Refuse a score of validation data that the task does not log; other metrics are known only in training.

    Args:
        cfg: The composed settings.
        scores: What the task logs under `val/`; None for a module that does not say.
    """
    monitor = str(cfg.task.monitor)
    if scores is None or not monitor.startswith("val/") or monitor.removeprefix("val/") in scores:
        return
    known = ", ".join(f"val/{score}" for score in scores)
    raise RecipeError(f"task.monitor={monitor} is no score of {choice(cfg, 'data')}: there are {known}")


def _check_channels(cfg: DictConfig, history: Any, channels: Any) -> None:
    """Check the channels of a network that maps the frames of a history, stacked, to the next frame.

    Args:
        cfg: The composed settings.
        history: Frames that are given. Data that do not tell this number are checked by their first batch.
        channels: Channels of a frame, likewise.
    """
    if not isinstance(history, int) or not isinstance(channels, int):
        return
    stacked = history * channels
    if (cfg.task.in_channels, cfg.task.out_channels) != (stacked, channels):
        raise RecipeError(
            f"{history} frames of {channels} channels are mapped to the next one: set "
            f"task.in_channels={stacked} task.out_channels={channels}"
        )


def _check_network(cfg: DictConfig, net: Any, data: Any) -> None:
    """Check the shape of an input, where the network or its number of dimensions asks for one."""
    dimension = getattr(net, "n_dim", None)  # neuraloperator's
    check_input = getattr(net, "check_input", None)
    asks = dimension is not None or check_input is not None
    if not asks or not hasattr(type(data), "sample_shape"):
        return
    pair = f"{choice(cfg, 'model')} does not fit {choice(cfg, 'data')}"
    shape = data.sample_shape  # a data file that is missing says so itself
    if dimension is not None and dimension != len(shape) - 1:
        raise RecipeError(f"{pair}: it takes fields in {dimension}D, got (channels, *space) {shape}")
    if check_input is None:
        return
    try:
        check_input(shape)
    except ValueError as error:
        raise RecipeError(f"{pair}: {error}") from error


def plain(cfg: Any, section: str = "") -> Any:
    """Return a section of settings as plain values, references resolved.

    Args:
        cfg: The settings.
        section: Dotted path of the section, or of a single value; empty for all settings.
    """
    value = cfg
    if section:
        value = OmegaConf.select(cfg, section)
    if not OmegaConf.is_config(value):
        return value
    return OmegaConf.to_container(value, resolve=True)


def check_resumed_config(cfg: DictConfig, saved_file: Path) -> list[str]:
    """Compare the settings with those of the run that is resumed.

    Args:
        cfg: The settings now.
        saved_file: The run folder's `config.yaml`.

    Returns:
        Other sections that differ and that the result depends on, for a note to the user.

    Raises:
        RecipeError: The model, the data, the learning rate, the optimizer or the scheduler differ, in fine-tuning
            what `training` says of them. The last three continue with what the checkpoint holds, so that other
            settings would be noted and have no effect.
    """
    saved = OmegaConf.create(current_settings(plain(OmegaConf.load(saved_file))))
    before, now = (_without(plain(settings), _FREE_AT_RESUME) for settings in (saved, cfg))
    changed = [section for section in {**before, **now} if before.get(section) != now.get(section)]
    fatal = [path for path in _RESUMED_AS_THEY_WERE if plain(saved, path) != plain(cfg, path)]
    if fatal:
        raise RecipeError(
            f"ckpt_path={cfg.ckpt_path} comes from a run with another {' and another '.join(fatal)}; "
            f"repeat that run's overrides (its settings are in {saved_file}){_for_more_epochs(saved, cfg)}"
        )
    return changed


def _without(settings: dict[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """Return settings without those at some dotted paths, of one or two names."""
    left = dict(settings)
    for path in paths:
        section, _, name = path.partition(".")
        if not name:
            left.pop(section, None)
        elif isinstance(left.get(section), dict):
            left[section] = {key: value for key, value in left[section].items() if key != name}
    return left


def _for_more_epochs(saved: DictConfig, cfg: DictConfig) -> str:
    """Return how to train longer with the scheduler as it was, where the length of the run has changed it."""
    before, now = (plain(settings, "scheduler") or {} for settings in (saved, cfg))
    changed = [name for name in before if name in now and before[name] != now[name]]
    if not changed or plain(saved, "trainer") == plain(cfg, "trainer"):
        return ""
    as_before = " ".join(f"scheduler.{name}={before[name]}" for name in changed)
    return f". To train longer with the learning rates of the scheduler as it was, add {as_before}"


def build(cfg: DictConfig, path: str, **extra: Any) -> Any:
    """Instantiate the settings at `path`.

    Args:
        cfg: All settings.
        path: Dotted path, say "logger.wandb".
        extra: More keyword arguments.

    Returns:
        What their `_target_` makes: an object, or with `_partial_: true` a function that makes it.

    Raises:
        RecipeError: The constructor refuses; the message names the settings and the reason.
    """
    try:
        return instantiate(OmegaConf.select(cfg, path), _convert_="all", **extra)
    except InstantiationException as error:
        reason = error.__cause__ or error
        message = f"{path}: {reason}"
        if "pip install" not in message:
            message += remedy(reason)
        if isinstance(reason, ImportError) and path.startswith("logger"):
            message += ", or logger=csv"
        raise RecipeError(message) from error


def build_balancer(cfg: DictConfig) -> Any:
    """Instantiate the balancing callback, without the name of the arm; return None for the arm `off`.

    Args:
        cfg: The composed settings.

    Raises:
        RecipeError: The callback refuses its options; the message names the reason.
    """
    options = dict(plain(cfg, "balancing"))
    options.pop("arm", None)
    if options.get("_target_") is None:
        return None
    _check_map_of_preset(options)
    return build(OmegaConf.create({"balancing": options}), "balancing")


def _check_map_of_preset(options: Mapping[str, Any]) -> None:
    """Refuse a preset whose map the settings of the arm would silently replace.

    Args:
        options: Those of the callback. An unknown preset is refused by the callback itself.

    Raises:
        RecipeError: They name another map than the preset.
    """
    preset, named = options.get("preset"), options.get("assign_func")
    maps: dict[Any, str] = {name: published.options["assign_func"] for name, published in PRESETS.items()}
    own = maps.get(preset, named)
    if named not in (None, own):
        raise RecipeError(
            f"balancing.preset={preset} maps by {own}, and balancing.assign_func={named} would take its place: "
            f"add balancing.assign_func={own}, or leave the preset out"
        )
