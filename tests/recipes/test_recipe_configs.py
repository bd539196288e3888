"""Every config file composes, builds and runs; the arms have the published numbers."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from inspect import signature
from itertools import chain, zip_longest
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from hydra.utils import get_class
from lightning import LightningDataModule, LightningModule
from omegaconf import DictConfig, OmegaConf

from farms_tb import FARMSTempBalance
from recipes.config import ARMS, CONFIG_DIR, build, build_balancer, check_config
from recipes.data.download import FILES as DATA_FILES
from recipes.data.download import FOLDER
from recipes.data.pdebench import PDEBenchFlow
from recipes.errors import RecipeError
from recipes.run import build_run
from recipes.train import train
from tests.recipes.fake_images import TRAIN
from tests.recipes.pdebench_files import write_darcy, write_flow
from tests.recipes.recipe_runs import TINY_DARCY, TINY_LLAMA, TINY_TOKENS
from tests.recipes.tokenizers import write_llama, write_tokenizer

Settings = Callable[..., DictConfig]

CONF = Path(CONFIG_DIR)
EXPERIMENTS = sorted(
    file.relative_to(CONF / "experiment").with_suffix("").as_posix()
    for file in (CONF / "experiment").rglob("*.yaml")
    if not file.stem.startswith("_")
    # These are tested with their own commands.
    and file.parent.name != "prune"
    and "recipes.finetune" not in file.read_text(encoding="utf-8")
)
DEMOS = [
    "cifar100_resnet18",
    "cifar100_vgg16",
    "cifar100_vit",
    "darcy_fno",
    "darcy_unet",
    "digits_resnet18",
    "fashion_vit",
    "grokking_mlp",
    "nano_llama_60m",
    "smollm2_wikipedia",
    "tiny_lm",
]
ELSEWHERE = {"experiment", "hydra", "study"}  # tested below or with their own commands
GROUPS = {
    folder.name: sorted(file.stem for file in folder.glob("*.yaml") if not file.stem.startswith("_"))
    for folder in sorted(CONF.iterdir())
    if folder.is_dir() and folder.name not in ELSEWHERE
}
# Each file once: data and models alone, as they have to fit, and one of every other group together.
ALONE = ("data", "model")
SINGLE = [(f"{group}={name}",) for group in ALONE for name in GROUPS[group]]
OTHERS = [[f"{group}={name}" for name in names] for group, names in GROUPS.items() if group not in ALONE]
BATCHES = [*SINGLE, *(tuple(filter(None, files)) for files in zip_longest(*OTHERS))]

# What a config file needs from its neighbours.
COMPANIONS: dict[str, tuple[str, ...]] = {
    "data=digits": ("model=resnet18",),
    "data=cifar10": ("model=resnet18",),
    "data=cifar100": ("model=resnet18",),
    "data=svhn": ("model=resnet18",),
    "data=fashion_mnist": ("model=resnet18",),
    "data=tinyimagenet": ("model=resnet18",),
    "data=pdebench_cfd1d": ("model=fno_cfd1d", "data.every_point=1", "data.every_frame=1"),
    "data=pdebench_cfd2d": ("model=fno_cfd2d", "data.every_point=1"),
    "data=text": ("model=byte_llama",),
    "data=tokens": ("model=llama_60m", "model.net.width=32"),
    "model=byte_llama": ("data=text",),
    "model=llama_60m": ("data=tokens", "model.net.width=32"),
    "model=pretrained_lm": ("data=tokens", "data.vocabulary=64"),
    "model=resnet18": ("data=digits",),
    "model=resnet34": ("data=digits",),
    "model=vgg16": ("data=digits", "data.image_size=32"),
    "model=vgg19": ("data=digits", "data.image_size=32"),
    "model=vit_small": ("data=digits", "data.image_size=32"),
    "model=mlp": ("data=digits",),
    "model=wrn16_8": ("data=digits", "model.net.width=2"),
    "model=wrn28_6": ("data=digits", "model.net.width=2"),
    "model=fno_cfd1d": ("data=pdebench_cfd1d", "data.every_point=1", "data.every_frame=1"),
    "model=unet_cfd1d": ("data=pdebench_cfd1d", "data.every_point=1", "data.every_frame=1"),
    "model=fno_cfd2d": ("data=pdebench_cfd2d", "data.every_point=1"),
    "model=unet_cfd2d": ("data=pdebench_cfd2d", "data.every_point=1"),
    "trainer=gpu": ("trainer.accelerator=cpu",),
    "trainer=ddp": ("trainer.accelerator=cpu",),
    "trainer=fsdp": ("trainer.accelerator=cpu", "trainer.devices=1"),
}


@pytest.fixture(scope="session")
def pde_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PDEBench's files, tiny, under their names."""
    folder = tmp_path_factory.mktemp("pde") / FOLDER
    for name, file in DATA_FILES.items():
        if name.startswith("darcy"):
            write_darcy(folder / file.file_name, samples=20)
        else:
            write_flow(folder / file.file_name, dimensions=int(name[3]), samples=20)
    return folder.parent


def test_groups_are_the_promised_ones() -> None:
    promised = "data model optimizer scheduler balancing logger trainer paths debug callbacks sweep"
    assert set(GROUPS) == set(promised.split())
    assert set(GROUPS["balancing"]) == set(ARMS)


def test_experiments_are_the_published_ones() -> None:
    """The settings of the papers, and the demos."""
    folders = Counter(Path(name).parent.as_posix() for name in EXPERIMENTS)
    del folders["study"]
    assert folders == {".": len(DEMOS), "farms": 8, "tempbalance": 12, "sciml": 6}
    assert [name for name in EXPERIMENTS if "/" not in name] == DEMOS


def test_the_options_are_those_of_the_callback_with_its_defaults(settings: Settings) -> None:
    """A new option, or another default, of the callback has to reach conf/balancing/_options.yaml."""
    written = OmegaConf.to_container(settings("~experiment").balancing, resolve=True)
    assert isinstance(written, dict)
    assert (written.pop("_target_"), written.pop("arm")) == ("farms_tb.FARMSTempBalance", "farms")
    objects = {"spectrum", "ratios", "schedule", "logging"}  # the same options as objects
    parameters = signature(FARMSTempBalance).parameters.values()
    defaults = {parameter.name: parameter.default for parameter in parameters if parameter.name not in objects}
    defaults["assign_func"] = "tb_linear_map"  # that of FARMS: the arm is the published method
    # YAML has lists where Python has tuples.
    assert written == {name: list(x) if isinstance(x, tuple) else x for name, x in defaults.items()}


@pytest.mark.parametrize("files", BATCHES, ids=" ".join)
def test_every_config_composes_and_builds(
    settings: Settings, tmp_path: Path, pde_files: Path, files: tuple[str, ...]
) -> None:
    folders = (f"paths.run_dir={tmp_path}/run", f"paths.data_dir={pde_files}")
    companions = list(chain.from_iterable(COMPANIONS.get(file, ()) for file in files))
    if "model=pretrained_lm" in files:
        companions.append(f"model.net.path={write_llama(tmp_path / 'llama')}")
    cfg = settings(*files, *folders, *companions)
    check_config(cfg)
    run = build_run(cfg)
    assert isinstance(run.data, LightningDataModule)
    assert isinstance(run.model, LightningModule)
    callbacks = run.trainer.callbacks  # type: ignore[attr-defined]
    assert sum(isinstance(callback, FARMSTempBalance) for callback in callbacks) == (cfg.arm != "off")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_how_to_run_them_and_bear_their_name(name: str) -> None:
    file = CONF / "experiment" / f"{name}.yaml"
    first, second = file.read_text(encoding="utf-8").splitlines()[:2]
    assert first == "# @package _global_"
    command, *options = second.split("experiment=")
    assert command.strip() in ("# python -m recipes.train", "# python -m recipes.study")
    assert name == "darcy_unet" or options[0].split()[0] == name
    if not name.startswith(("study/", "sciml/darcy")):  # beta is part of the latter's names
        assert OmegaConf.load(file).name == name


# Narrower networks and smaller batches, nothing else. Fractions need more samples than the tiny files have.
IMAGES = ("model.net.width=8", "data.val_size=8", "data.batch_size=8")
FNO_1D, FNO_2D = (("model.net.hidden_channels=8", f"model.net.n_modes={modes}") for modes in ("[4]", "[4,4]"))
PDE = ("data.fraction=1", "data.num_workers=0", "data.batch_size=2")
FLOW = (*PDE, "data.every_point=1", "data.every_frame=1")
SMALL = {
    r"(cifar100|fashion)_vit": ("model.net.width=24", *IMAGES[1:]),
    r"(tempbalance/|farms/)?(cifar|svhn)": IMAGES,
    r"tempbalance/tinyimagenet_resnet": IMAGES,
    r"tempbalance/tinyimagenet_wrn": ("model.net.width=2", *IMAGES[1:]),
    r"digits_resnet18": ("model.net.width=8",),
    r"tiny_lm": (f"data.path={__file__}", "data.val_bytes=600", "data.test_bytes=600", "model.net.width=32"),
    r"nano_llama_60m": (*TINY_LLAMA, "trainer.max_steps=1"),
    r"smollm2_wikipedia": (*TINY_TOKENS, "trainer.max_steps=1"),
    r"grokking_mlp": ("data.passes=1",),
    r"darcy_fno": (*TINY_DARCY, *FNO_2D),
    r"darcy_unet": (*TINY_DARCY, "model.net.width=4"),
    r"sciml/darcy_fno": (*PDE, *FNO_2D),
    r"sciml/darcy_unet": (*PDE, "model.net.width=4"),
    r"sciml/cfd1d_fno": (*FLOW, *FNO_1D),
    r"sciml/cfd2d_fno": (*FLOW, *FNO_2D),
    r"sciml/cfd.*_unet": (*FLOW, "model.net.width=4"),
}


@pytest.mark.filterwarnings("ignore:layers with no alpha keep the base learning rate")  # they are narrow
@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if not name.startswith("study/")])
def test_every_experiment_runs_one_batch(
    settings: Settings,
    fake_images: Path,
    pde_files: Path,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("recipes.summary.draw_run", lambda *args, **options: [])  # seconds, and tested elsewhere
    overrides = next(options for pattern, options in SMALL.items() if re.match(pattern, name))
    folder: tuple[str, ...]
    if name in ("nano_llama_60m", "smollm2_wikipedia"):
        folder = (f"data.path={__file__}", f"data.tokenizer={write_tokenizer(tmp_path / 'tokenizer')}")
        if name == "smollm2_wikipedia":
            folder = (*folder, f"model.net.path={write_llama(tmp_path / 'llama')}")
    elif "darcy" in name and not name.startswith("sciml/"):
        folder = ()  # made on the spot
    else:
        folder = (f"paths.data_dir={pde_files if name.startswith('sciml/') else fake_images}",)
    cfg = settings(f"experiment={name}", *folder, *overrides, "debug=one_batch", "trainer=cpu", "logger=csv")
    del cfg.callbacks.pictures
    facts = train(cfg)
    assert facts["epochs"] == facts["steps"] == 1
    assert all(torch.isfinite(torch.tensor(value)) for value in facts["test"].values())
    columns = (Path(cfg.paths.run_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    logged = {column.removeprefix("val/") for column in columns if column.startswith("val/")}
    assert logged == set(get_class(cfg.model._target_).scores)  # type: ignore[attr-defined]


def test_all_training_images_are_used_on_demand(settings: Settings, fake_images: Path) -> None:
    """As published: nothing is held out, so the last epoch's weights are tested."""
    options = (
        "data.val_size=0",
        "task.monitor=null",
        "data.batch_size=20",
        "model.net.width=8",
        "trainer.max_epochs=2",
    )
    folder = f"paths.data_dir={fake_images}"
    cfg = settings("experiment=cifar100_resnet18", folder, *options, "balancing=off", "trainer=cpu", "logger=csv")
    facts = train(cfg)
    assert facts["steps"] == 2 * TRAIN // 20
    assert (facts["best_score"], facts["best_epoch"]) == (None, 2)


# Network: parameters with three channels in and 100 classes out, counted from the papers' descriptions.
NETWORKS = {"resnet18": 11_220_132, "resnet34": 21_328_292, "vgg16": 14_774_436, "vgg19": 20_086_692}


@pytest.mark.parametrize(("network", "parameters"), NETWORKS.items())
def test_published_networks_have_their_full_width(settings: Settings, network: str, parameters: int) -> None:
    cfg = settings(f"experiment=farms/cifar100_{network}")
    with torch.device("meta"):
        net = build(cfg, "model.net")
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters


# The FARMS paper on CIFAR-100. Learning rate of the baseline and tuned, then the lowest ratio (the highest is two
# minus that) of: full-matrix TempBalance on all layers, without first and last, FARMS on all layers, FARMS with
# layers left out, and which.
FARMS_PAPER = {
    "resnet18": (0.1, 0.1, 0.6, 0.2, 0.1, 0.1, (True, True)),
    "resnet34": (0.05, 0.1, 0.5, 0.3, 0.2, 0.3, (True, True)),
    "vgg16": (0.05, 0.05, 0.6, 0.3, 0.2, 0.2, (False, True)),
    "vgg19": (0.05, 0.05, 0.6, 0.2, 0.2, 0.4, (False, True)),
}
# The TempBalance paper: learning rate, that of the baseline, lowest ratio.
TEMPBALANCE_PAPER = {
    "cifar100_resnet18": (0.1, 0.1, 0.5),
    "cifar100_resnet34": (0.1, 0.05, 0.5),
    "cifar100_vgg16": (0.05, 0.05, 0.5),
    "cifar100_vgg19": (0.05, 0.05, 0.5),
    "cifar10_resnet18": (0.1, 0.1, 0.5),
    "cifar10_vgg16": (0.05, 0.1, 0.5),
    "svhn_resnet18": (0.1, 0.1, 0.5),
    "svhn_vgg16": (0.05, 0.05, 0.5),
    "tinyimagenet_resnet18": (0.1, 0.1, 0.6),
    "tinyimagenet_resnet34": (0.1, 0.1, 0.6),
    "tinyimagenet_wrn16_8": (0.1, 0.1, 0.6),
    "tinyimagenet_wrn28_6": (0.1, 0.05, 0.6),
}
# Sigmoid strength of the FNO on 2D flows, by data fraction.
STRENGTHS = {"1": 0.125, "1/2": 0.5, "1/4": 1.0, "1/10": 0.25, "1/40": 0.5, "1/180": 1.0}

# Model Balancing on Darcy flow: middle of the learning rates searched, and decay, by data fraction.
DARCY = {
    ("sciml/darcy_fno", "1"): (1e-2, 1e-6),
    ("sciml/darcy_fno", "1/10"): (2.5e-2, 1e-4),
    ("sciml/darcy_fno", "1/20"): (2.5e-2, 1e-3),
    ("sciml/darcy_fno", "1/40"): (2.5e-2, 1e-3),
    ("sciml/darcy_fno", "1/180"): (2.5e-2, 1e-2),
    ("sciml/darcy_unet", "1"): (5e-4, 1e-7),
    ("sciml/darcy_unet", "1/20"): (1e-2, 1e-3),
    ("sciml/darcy_unet", "1/40"): (2.5e-2, 1e-3),
}


def _assert_image_training(cfg: DictConfig, lr: float) -> None:
    optimizer = cfg.optimizer
    assert (optimizer._target_, optimizer.momentum, optimizer.weight_decay) == ("torch.optim.SGD", 0.9, 5e-4)
    assert (optimizer.lr, optimizer.nesterov) == (lr, False)
    assert (cfg.trainer.max_epochs, cfg.scheduler.T_max, cfg.scheduler.eta_min) == (200, 200, 0.0)
    assert (cfg.data.batch_size, cfg.seed) == (128, 43)


def _assert_image_arm(cfg: DictConfig, lowest: float, ends: tuple[bool, bool]) -> None:
    farms = cfg.balancing
    assert (farms.lr_min_ratio, farms.lr_max_ratio) == pytest.approx((lowest, 2 - lowest))
    assert (farms.exclude_first, farms.exclude_last, list(farms.exclude)) == (*ends, [])
    assert (farms.esd, farms.min_eigenvalues) == (cfg.arm, 5 if cfg.arm == "farms" else 50)
    assert (farms.fit, farms.xmin_pos, farms.metric) == ("median", 2, "alpha")
    assert (farms.assign_func, farms.filter_zeros, farms.norms) == ("tb_linear_map", False, "follow")
    assert (farms.window, farms.aspect_ratio, farms.windows_per_dim) == (100, 1.0, 9)


@pytest.mark.parametrize("network", FARMS_PAPER)
def test_settings_of_the_farms_paper(settings: Settings, network: str) -> None:
    base, tuned, full_all, full, farms_all, farms, ends = FARMS_PAPER[network]
    none, both = (False, False), (True, True)
    for suffix, arms in (
        ("_all", {"full": (full_all, none), "farms": (farms_all, none)}),
        ("", {"full": (full, both), "farms": (farms, ends)}),
    ):
        name = f"experiment=farms/cifar100_{network}{suffix}"
        for arm, (lowest, left_out) in arms.items():
            cfg = settings(name, *([] if arm == "farms" else [f"balancing={arm}"]))  # the one that is the default
            assert cfg.arm == arm
            _assert_image_arm(cfg, lowest, left_out)
            _assert_image_training(cfg, tuned)
        off = settings(name, "balancing=off")
        assert off.balancing == {"arm": "off"}
        assert off.seeds == "43,37,13"
        _assert_image_training(off, base)
    if network in ("resnet18", "vgg16"):
        short, long = (settings(f"experiment={prefix}cifar100_{network}") for prefix in ("", "farms/"))
        assert OmegaConf.to_yaml(short) == OmegaConf.to_yaml(long).replace(f"farms/{short.name}", short.name)


@pytest.mark.parametrize("task", TEMPBALANCE_PAPER)
def test_settings_of_the_tempbalance_paper(settings: Settings, task: str) -> None:
    tuned, base, lowest = TEMPBALANCE_PAPER[task]
    cfg = settings(f"experiment=tempbalance/{task}")
    assert cfg.arm == "full"
    assert cfg.seeds == "43,37,13,51,71"
    assert cfg.data.dataset == task.split("_")[0]
    _assert_image_arm(cfg, lowest, (True, True))
    _assert_image_training(cfg, tuned)
    _assert_image_training(settings(f"experiment=tempbalance/{task}", "balancing=off"), base)


def test_llr_has_the_numbers_of_its_preset(settings: Settings) -> None:
    options = build_balancer(settings("experiment=nano_llama_60m")).options
    assert options == FARMSTempBalance(preset="llr").options
    other = build_balancer(settings("experiment=nano_llama_60m", "balancing.lr_max_ratio=3")).options.ratios
    assert dict(other.fixed_pairs) == {"embed*": 3.0, "lm_head": 3.0}


def test_a_preset_and_another_map_are_refused(settings: Settings) -> None:
    with pytest.raises(RecipeError, match=r"preset=shrinkage maps by shrinkage.*assign_func=tb_linear_map"):
        build_balancer(settings("experiment=tiny_lm", "balancing.preset=shrinkage"))
    chosen = settings("experiment=tiny_lm", "balancing.preset=shrinkage", "balancing.assign_func=shrinkage")
    assert build_balancer(chosen).options.ratios.assign_func == "shrinkage"
    assert (
        build_balancer(settings("experiment=tiny_lm", "balancing.preset=tempbalance")).options.spectrum.esd
        == "full"
    )
    with pytest.raises(RecipeError, match="unknown"):
        build_balancer(settings("experiment=tiny_lm", "balancing.preset=unknown"))


def test_alphadecay_has_the_numbers_of_its_preset(settings: Settings) -> None:
    options = build_balancer(settings("experiment=tiny_lm", "balancing=alphadecay", "balancing.every_n_steps=500"))
    assert options.options == FARMSTempBalance(preset="alphadecay", threads=2).options


def test_settings_of_the_llama_of_60_million(settings: Settings) -> None:
    cfg = settings("experiment=nano_llama_60m")
    with torch.device("meta"):
        net = build(cfg, "model.net")
    width, hidden, depth, vocabulary = 512, 1376, 8, 32000
    block = 4 * width**2 + 3 * width * hidden + 2 * width
    assert sum(parameter.numel() for parameter in net.parameters()) == (
        2 * vocabulary * width + depth * block + width
    )
    tokens = cfg.trainer.max_steps * cfg.trainer.accumulate_grad_batches * cfg.data.batch_size * cfg.data.length
    assert tokens == cfg.data.train_tokens
    assert (cfg.arm, settings("experiment=nano_llama_60m", "balancing=off").lr) == ("llr", cfg.lr)


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name.startswith("sciml/")])
def test_settings_of_pdebench(settings: Settings, name: str) -> None:
    published = name == "sciml/cfd2d_fno"
    cfg = settings(f"experiment={name}", "balancing=full")
    farms, optimizer, scheduler = cfg.balancing, cfg.optimizer, cfg.scheduler
    assert (farms.assign_func, farms.sigmoid_tau, farms.fit) == ("tb_sigmoid", 10.0, "median")
    assert (farms.filter_zeros, farms.min_eigenvalues) == (True, 12)
    assert farms.sigmoid_min == farms.sigmoid_max == (0.125 if published else 0.5)
    regime = DARCY.get((name, "1"), (2.5e-3 if published else 1e-3, 1e-4))
    assert (optimizer._target_, optimizer.lr, optimizer.weight_decay) == ("torch.optim.Adam", *regime)
    assert cfg.trainer.max_epochs == (700 if published else 500)
    assert (scheduler.step_size, scheduler.gamma) == (100, 0.5)
    assert (cfg.seed, cfg.seeds, cfg.data.fraction) == (2024, "2024,2023,2022", 1)
    if "darcy" in name:
        assert (cfg.data.batch_size, cfg.data.every_point) == (50, 1)
    else:
        assert cfg.data.batch_size == (20 if "2d" in name else 100)
    net = cfg.model.net
    if "fno" in name:
        assert (net.n_modes[0], net.hidden_channels, net.n_layers) == (22 if "1d" in name else 24, 20, 4)
    else:
        assert net.width == 32


@pytest.mark.parametrize(("fraction", "strength"), STRENGTHS.items())
def test_strength_of_the_2d_fno_goes_with_the_fraction(settings: Settings, fraction: str, strength: float) -> None:
    for arm in ("farms", "full", "placebo"):
        options = settings("experiment=sciml/cfd2d_fno", f"data.fraction={fraction}", f"balancing={arm}").balancing
        assert options.sigmoid_min == options.sigmoid_max == strength


@pytest.mark.parametrize(("name", "fraction"), DARCY)
def test_training_of_darcy_goes_with_the_fraction(settings: Settings, name: str, fraction: str) -> None:
    for arm in ("farms", "full", "off"):
        cfg = settings(f"experiment={name}", f"data.fraction={fraction}", f"balancing={arm}")
        assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == DARCY[name, fraction]
        assert (cfg.data.batch_size, cfg.data.beta) == (50, 100)


@pytest.mark.parametrize("beta", ["0.01", "0.1", "1", "10", "100"])
def test_darcys_source_is_a_setting(settings: Settings, beta: str) -> None:
    for network in ("fno", "unet"):
        cfg = settings(f"experiment=sciml/darcy_{network}", f"data.beta={beta}")
        assert (cfg.name, cfg.data.beta) == (f"sciml/darcy_beta{beta}_{network}", float(beta))
        build(cfg, "data")


def _sweep(*overrides: str) -> list[list[str]]:
    """Return the overrides of each run that a sweep makes, in the order in which Hydra launches them."""
    with initialize_config_dir(CONFIG_DIR, version_base="1.3"):
        cfg = compose("train", overrides=list(overrides), return_hydra_config=True)
    assert cfg.hydra.mode == RunMode.MULTIRUN
    params = OmegaConf.to_container(cfg.hydra.sweeper.params, resolve=True)
    assert isinstance(params, dict)
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


@pytest.mark.parametrize(
    ("experiment", "seeds"),
    [
        ("farms/cifar100_vgg19", "43 37 13"),
        ("tempbalance/svhn_vgg16", "43 37 13 51 71"),
        ("sciml/cfd1d_unet", "2024 2023 2022"),
    ],
)
def test_one_flag_sweeps_the_published_seeds(experiment: str, seeds: str) -> None:
    runs = _sweep(f"experiment={experiment}", "sweep=seeds")
    assert runs == [[f"seed={seed}"] for seed in seeds.split()]


def test_ablations_sweep_the_published_values(settings: Settings) -> None:
    experiment = "experiment=farms/cifar100_resnet18"
    ratios = [
        settings(experiment, *run).balancing.aspect_ratio for run in _sweep(experiment, "sweep=aspect_ratio")
    ]
    assert ratios == [0.5, 0.75, 1, 1.25, 1.5]
    ranges = [settings(experiment, *run).balancing for run in _sweep(experiment, "sweep=ratio_range")]
    expected = [(0.1, 1.9), (0.2, 1.8), (0.3, 1.7), (0.4, 1.6), (0.5, 1.5)]
    assert [(farms.lr_min_ratio, farms.lr_max_ratio) for farms in ranges] == expected
    assert all(farms.exclude_first for farms in ranges)  # the other settings of the arm stay
    assert len(_sweep(experiment, "sweep=[aspect_ratio,seeds]")) == 15


# Experiment: k of each published fraction 1/k.
FRACTIONS = {
    "sciml/cfd1d_fno": [1, 2, 4, 10, 20, 40, 180],
    "sciml/cfd2d_fno": [1, 2, 4, 10, 40, 180],
    "sciml/darcy_fno": [1, 10, 20, 40, 180],
    "sciml/darcy_unet": [1, 20, 40],
}


@pytest.mark.parametrize(("name", "steps"), FRACTIONS.items())
def test_fractions_sweep_the_published_ones(settings: Settings, name: str, steps: list[int]) -> None:
    runs = [settings(f"experiment={name}", *run) for run in _sweep(f"experiment={name}", "sweep=fractions")]
    for cfg in runs:
        check_config(cfg)
    assert [PDEBenchFlow("data", fraction=cfg.data.fraction).options.step for cfg in runs] == steps
    for table in ("regime_by_fraction", "strength_by_fraction"):
        assert list(runs[0].arms.get(table, runs[0].arms.fractions.split(","))) == runs[0].arms.fractions.split(
            ","
        )


def test_a_fraction_that_is_not_published_needs_numbers(settings: Settings) -> None:
    experiment = ("experiment=sciml/darcy_unet", "data.fraction=1/10")
    with pytest.raises(RecipeError, match=r"data\.fraction=1/10: .* 1, 1/20, 1/40 alone") as refused:
        check_config(settings(*experiment))
    way_out = str(refused.value).split("'")[1]
    cfg = settings(*experiment, way_out)
    check_config(cfg)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (1e-2, 1e-3)
    with pytest.raises(RecipeError, match=r"data\.fraction=0\.05"):  # a number is not what the table has
        check_config(settings("experiment=sciml/darcy_unet", "data.fraction=0.05"))


@pytest.mark.parametrize("name", DEMOS)
def test_arms_differ_in_the_callback_alone(settings: Settings, name: str) -> None:
    arms = [settings(f"experiment={name}", f"balancing={arm}") for arm in ("farms", "full", "off", "monitor")]
    plain = [OmegaConf.to_container(cfg, resolve=True) for cfg in arms]
    for arm in plain:
        assert isinstance(arm, dict)
        for section in ("balancing", "arm", "logger"):
            del arm[section]
        del arm["callbacks"]["pictures"]["title"]
    assert all(arm == plain[0] for arm in plain)
    assert (arms[3].balancing.lr_min_ratio, arms[3].balancing.lr_max_ratio) == (1.0, 1.0)


def test_fno_leaves_out_lifting_and_projection_by_name(settings: Settings) -> None:
    farms = build_balancer(settings("experiment=darcy_fno"))
    assert farms.options.ratios.exclude == ("lifting.*", "projection.*")
    assert (farms.options.ratios.exclude_first, farms.options.ratios.exclude_last) == (False, False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model=resnet18",), "model=resnet18 and data=darcy do not go together: the model learns images"),
        (("data=digits",), "model=unet and data=digits do not go together: the model learns fields"),
        (("data.resolution=24",), r"model=unet does not fit data=darcy: .* must divide by 16, got \(24, 24\)"),
        (("model=vgg16", "data=digits"), "model=vgg16 does not fit data=digits: .*data.image_size=32"),
        (("balancing.lr_min_ratio=2",), "balancing: lr_min_ratio must not exceed lr_max_ratio"),
        (("balancing.esd=fll",), "balancing: esd must be one of 'farms', 'full', got 'fll'"),
        (("data.family=fog",), "data: data.family must be one of grf, bumps"),
        (("arm=full",), r"arm=full does not match balancing=farms; .*\|farms\|full\|"),
        (("ckpt_path=/no/such.ckpt",), "ckpt_path=/no/such.ckpt is not a file"),
        (("data.train_size=null",), "data.train_size must be a whole number of at least 1, got None"),
        (("data.resolution=null",), "data.resolution must be a whole number of at least 2, got None"),
        (("experiment=digits_resnet18", "data.val_size=null"), "data.val_size must be .* at least 10"),
        (("experiment=digits_resnet18", "data.test_size=9"), "data.test_size must be .* at least 10"),
        (("experiment=grokking_mlp", "data.passes=null"), "data.passes must be .* at least 1"),
        (("experiment=farms/cifar100_resnet18", "data.val_size=null"), "data.val_size must be a whole number"),
        (("experiment=tiny_lm", "data.val_bytes=null"), "data.val_bytes must be a whole number of at least 1"),
        (("experiment=nano_llama_60m", "data.length=null"), "data.length must be a whole number of at least 1"),
        (("experiment=sciml/darcy_unet", "data.every_point=null"), "data.every_point must be a whole number"),
        (("experiment=sciml/darcy_unet", "data.memory_gb=null"), "data.memory_gb must be a number, got None"),
        (("experiment=sciml/cfd1d_unet", "data.history=null"), "data.history must be .* at least 1"),
        (("threads=0",), "threads must be null or a whole number of at least 1, got 0"),
        (("+colour=red",), "unknown settings at the top level: colour"),
        (("~task",), "missing settings at the top level: task"),
        (("lr=${nowhere}",), "the settings do not resolve: Interpolation key 'nowhere' not found"),
        (
            ("experiment=cifar100_vgg16", "task.out_channels=10"),
            "task.out_channels=10, but data=cifar100 has 100 classes; leave it at 100",
        ),
        (("model=resnet18", "data=digits", "task.out_channels=7"), "task.out_channels=7, but data=digits has 10"),
        (
            ("experiment=cifar100_vgg16", "data.val_size=0"),
            r"data\.val_size=0 leaves no val/accuracy to choose the best epoch by; set task\.monitor=null too",
        ),
        (("~callbacks.checkpoint",), "exactly one ModelCheckpoint, got 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_settings_stop_before_data_is_made(
    settings: Settings, tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        train(settings(*overrides))
    assert not (tmp_path / "data").exists()
    assert not any((tmp_path / "runs").rglob("*.*"))


def test_missing_wandb_names_the_way_out(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RecipeError, match=r"logger.wandb: .*farms-tb\[recipes\].*logger=csv"):
        train(settings())
