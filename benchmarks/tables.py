"""The tables of the study pages, from their published runs.

    python -m benchmarks.tables

Nothing is trained. Each table stands on its page between the lines `<!-- table NAME -->` and
`<!-- end of table -->`; this command writes it anew from the `results.csv` of its study.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.published import BASELINE, RESULTS, published_runs, published_search
from benchmarks.results import markdown_table, replace_between
from recipes.study.effects import Row, summarise
from recipes.study.sensitivity import curves
from recipes.study.units import percent, unit_of

END_OF_TABLE = "<!-- end of table -->"


@dataclass(frozen=True)
class Cell:
    """Where runs are published.

    Attributes:
        folder: of the `results.csv`, below `docs/results`.
        name: of the cell there.
    """

    folder: str
    name: str

    def rows(self, arms: Sequence[str], baseline: str, results: Path) -> dict[str, Row]:
        """Return what is known of arms, compared with a baseline.

        Args:
            arms: names of arms, the baseline's among them or not.
            baseline: the arm that they are compared with.
            results: folder of all results.

        Raises:
            ValueError: an arm has no runs there.
        """
        compared = [baseline, *arms]
        runs = published_runs(self.folder, self.name, results, compared)
        return {row.arm: row for row in summarise({self.name: runs}, compared, baseline)}


@dataclass(frozen=True)
class ArmTable:
    """The arms of one cell against its baseline, a line an arm.

    Attributes:
        page: folder of the page, below `docs/results`.
        cell: its runs.
        arms: what each arm is, in words; the baseline comes first.
    """

    page: str
    cell: Cell
    arms: Mapping[str, str]

    def markdown(self, results: Path) -> str:
        """Return the table.

        Args:
            results: folder of all results.
        """
        rows = self.cell.rows(list(self.arms), BASELINE, results)
        return markdown_table([self._line(rows[arm], words) for arm, words in self.arms.items()])

    def _line(self, row: Row, words: str) -> dict[str, str]:
        """Return the line of one arm."""
        return {
            "arm": row.arm,
            "what it is": words,
            "rate": f"{row.lr:g}",
            "seeds": str(row.runs),
            "loss" if row.error == "loss" else "error": level(row),
            f"against {BASELINE}, {unit_of(row.error).name or '%'} (95 %)": change(row),
            "p (Holm)": p_value(row),
        }


@dataclass(frozen=True)
class SettingTable:
    """The same arms in several cells, a line a cell.

    Attributes:
        page: folder of the page, below `docs/results`.
        baseline: what the baseline is, in words.
        arms: what each other arm is, in words.
        cells: the cells by what they are, in words.
    """

    page: str
    baseline: str
    arms: Mapping[str, str]
    cells: Mapping[str, Cell]

    def markdown(self, results: Path) -> str:
        """Return the table.

        Args:
            results: folder of all results.
        """
        lines = []
        for words, cell in self.cells.items():
            rows = cell.rows(list(self.arms), BASELINE, results)
            lines.append(
                {
                    "setting": words,
                    "seeds": str(rows[BASELINE].runs),
                    f"{self.baseline}: rate, loss": f"{rows[BASELINE].lr:g}, {level(rows[BASELINE])}",
                    **{title: change(rows[arm]) for arm, title in self.arms.items()},
                }
            )
        return markdown_table(lines)


@dataclass(frozen=True)
class PairTable:
    """One arm against another, in several cells, a line a cell.

    Attributes:
        page: folder of the page, below `docs/results`.
        arm: the arm.
        title: of the column of comparisons.
        cells: by what they are in words, each cell and the other arm there.
    """

    page: str
    arm: str
    title: str
    cells: Mapping[str, tuple[Cell, str]]

    def markdown(self, results: Path) -> str:
        """Return the table.

        Args:
            results: folder of all results.
        """
        lines = []
        for words, (cell, other) in self.cells.items():
            row = cell.rows([self.arm], other, results)[self.arm]
            unit = unit_of(row.error).name or "%"
            lines.append({"task": words, "seeds": str(row.runs), self.title: change(row, f" {unit}")})
        return markdown_table(lines)


@dataclass(frozen=True)
class TriesTable:
    """The baseline's search with the rates that were tried at first and with more, a line a cell.

    Attributes:
        page: folder of the page, below `docs/results`.
        more: folder of the runs at the other rates, below `docs/results`.
        cells: the cells by what they are, in words.
    """

    page: str
    more: str
    cells: Mapping[str, Cell]

    def markdown(self, results: Path) -> str:
        """Return the table.

        Args:
            results: folder of all results.
        """
        return markdown_table([self._line(words, cell, results) for words, cell in self.cells.items()])

    def _line(self, words: str, cell: Cell, results: Path) -> dict[str, str]:
        """Return the line of one cell."""
        first = published_search(cell.folder, cell.name, results)
        searches = {"first": first, "all": {**first, **published_search(self.more, cell.name, results)}}
        line = {"task": words}
        for title, runs in searches.items():
            (curve,) = curves({cell.name: runs}, [BASELINE])
            best = curve.best
            line[f"{title} rates"] = str(len(curve.points))
            line[f"best of {title}: rate, error"] = f"{best.lr:g}, {shown_error(curve.metric, best.error)}"
        line["seeds a rate"] = str(best.seeds)
        return line


def level(row: Row) -> str:
    """Return the mean error: a share in per cent, others as they are."""
    return shown_error(row.error, row.error_mean)


def shown_error(metric: str, error: float) -> str:
    """Return an error: a share in per cent, others as they are.

    Args:
        metric: what the error is, "accuracy" for example.
        error: its value.
    """
    if unit_of(metric).name == "points":
        return f"{100 * error:.1f} %"
    return f"{error:.3f}"


def change(row: Row, unit: str = "") -> str:
    """Return the change of the error with its interval; empty for the baseline.

    Shares and losses are compared by their differences, in points and nats, other errors by their ratios, in per
    cent.

    Args:
        row: of an arm.
        unit: written behind the change.
    """
    if row.effect is None or row.difference is None:
        return ""
    metric = unit_of(row.error)
    if metric.name:
        digits = {"points": 1, "nats": 3}[metric.name]
        found = [metric.factor * value for value in (row.difference.mean, row.difference.low, row.difference.high)]
    else:
        digits = 1
        found = [percent(value) for value in (row.effect.mean, row.effect.low, row.effect.high)]
    mean, low, high = (f"{value:+.{digits}f}" for value in found)
    return f"{mean}{unit} ({low} to {high})"


def p_value(row: Row) -> str:
    """Return the corrected p-value with three digits behind the point; empty for the baseline."""
    if row.effect is None:
        return ""
    return "< 0.001" if row.p_holm < 0.001 else f"{row.p_holm:.3f}"


_MODELS = "controls/language_models"
_IMAGE_TASKS = "controls/images"
_FLOW = "controls/darcy_flow"
_TUNING = "controls/fine_tuning"
_LM = Cell(f"{_MODELS}/tiny_lm_small", "tiny_lm_small")
_LM_BIG = Cell("direction/tiny_lm", "tiny_lm_400")
_VIT = Cell(f"{_IMAGE_TASKS}/digits_vit_one_rate", "digits_vit_300")
_FASHION_RESNET = Cell(f"{_IMAGE_TASKS}/fashion", "fashion_resnet18_1000")
_FASHION_VIT = Cell(f"{_IMAGE_TASKS}/fashion", "fashion_vit_1000")
_IMAGES = {
    "full": "TempBalance, whole matrices",
    "full_reversed": "the same, reversed",
    "full_permuted": "its ratios on the wrong layers",
    "shrinkage": "map of shrunk effects",
    "small_alpha": "the same, small alphas faster",
}
_PATCHES_5 = {"embedding_head_faster": "no alpha: patch and position embedding and head 5"}
_ENDS_5 = "no alpha: embedding and head 5"
_DARCY_DIRECTIONS = {
    "off": "plain Adam",
    "full_s1": "TempBalance, s = 1",
    "full_s1_reversed": "the same, reversed",
}
_DARCY_CONTROLS = {**_DARCY_DIRECTIONS, "full_s1_permuted": "its ratios on the wrong layers"}
_DARCY = {**_DARCY_CONTROLS, "shrinkage": "map of shrunk effects"}
_MESSAGES = {
    "off": "plain AdamW",
    "model_balancing": "Model Balancing, one rate a block",
    "shrinkage": "map of shrunk effects, by layer",
    "last_faster": "no alpha: last block 2.3, the others 0.83",
}
_DIRECTIONS = {
    "off": "plain AdamW",
    "model_balancing": "Model Balancing, one rate a block",
    "reversed": "the same, reversed",
}
_LORA = {**_DIRECTIONS, "permuted": "its ratios on the wrong blocks"}
_BLOCKS_CONTROLS = {
    "reversed": "Model Balancing, reversed",
    "permuted": "Model Balancing's ratios on the wrong blocks",
}

TABLES: Mapping[str, ArmTable | SettingTable | PairTable | TriesTable] = {
    "language model": ArmTable(
        _MODELS,
        _LM,
        {
            "off": "plain AdamW",
            "small_alpha": "map of shrunk effects, small alphas faster",
            "shrinkage": "map of shrunk effects, the papers' direction",
            "small_alpha_permuted": "ratios of `small_alpha` on the wrong layers",
            "farms": "the papers' map of FARMS alphas",
            "farms_reversed": "the same, reversed",
            "farms_normalized": "the same as `farms`, ratios divided by their mean",
            "blocks": "the same as `farms`, one ratio a block",
            "llr": "LLR: whole matrices 1 to 5, embedding and head 5",
            "alphadecay": "AlphaDecay: weight decay by alpha",
            "feed_forward_faster": "no alpha: feed-forward 1.25, attention 0.8",
            "deep_faster": "no alpha: 0.7, 0.9, 1.1, 1.3 by depth",
            "embedding_head_faster": _ENDS_5,
            "embedding_faster": "no alpha: embedding 5",
            "head_faster": "no alpha: head 5",
            "shrinkage_embedding_head": "`shrinkage`, and embedding and head 5",
            "layer_decay": "timm's layer-wise decay of the rate, 0.75",
            "lamb": "LAMB",
            "lars": "LARS",
            "muon": "Muon, with AdamW for embedding, head and norms",
        },
    ),
    "variations": SettingTable(
        _MODELS,
        "AdamW or SGD",
        {
            "embedding_head_faster": "embedding and head 5",
            "small_alpha": "map of shrunk effects, small alphas faster",
        },
        {
            "as above, 0.23 million parameters": _LM,
            "0.07 million parameters": Cell(f"{_MODELS}/variations", "tiny_lm_mini"),
            "0.86 million parameters": _LM_BIG,
            "half of the steps": Cell(f"{_MODELS}/variations", "tiny_lm_small_200_steps"),
            "twice the steps": Cell(f"{_MODELS}/variations", "tiny_lm_small_800_steps"),
            "Python's standard library as text": Cell(f"{_MODELS}/variations", "tiny_lm_small_python"),
            "no weight decay": Cell(f"{_MODELS}/variations", "tiny_lm_small_no_decay"),
            "no warm-up": Cell(f"{_MODELS}/variations", "tiny_lm_small_no_warmup"),
            "SGD with momentum, no decay": Cell(f"{_MODELS}/variations", "tiny_lm_small_sgd"),
        },
    ),
    "finer rates": SettingTable(
        _MODELS,
        "AdamW",
        {
            "small_alpha": "small alphas faster",
            "small_alpha_permuted": "the same ratios on the wrong layers",
        },
        {
            "as above, 400 steps": Cell(f"{_MODELS}/finer", "tiny_lm_small"),
            "twice the steps, 800": Cell(f"{_MODELS}/finer", "tiny_lm_small_800_steps"),
        },
    ),
    "digits at the rates of the search": ArmTable(
        _IMAGE_TASKS,
        Cell(f"{_IMAGE_TASKS}/digits_vit", "digits_vit_300"),
        {"off": "plain AdamW", **_IMAGES, **_PATCHES_5},
    ),
    "digits at one rate": ArmTable(_IMAGE_TASKS, _VIT, {"off": "plain AdamW", **_IMAGES, **_PATCHES_5}),
    "FashionMNIST, ResNet-18": ArmTable(
        _IMAGE_TASKS,
        _FASHION_RESNET,
        {"off": "plain SGD", **_IMAGES, "ends_faster": "no alpha: first convolution and last layer 5"},
    ),
    "FashionMNIST, transformer": ArmTable(
        _IMAGE_TASKS,
        _FASHION_VIT,
        {"off": "plain AdamW", **_IMAGES, **_PATCHES_5},
    ),
    "Darcy flow": ArmTable(_FLOW, Cell(f"{_FLOW}/darcy_beta100", "darcy_beta100_fno_180"), _DARCY),
    "Darcy flow, 225 samples": ArmTable(
        _FLOW,
        Cell(f"{_FLOW}/darcy_beta100_40", "darcy_beta100_fno_40"),
        {**_DARCY_DIRECTIONS, "full_s1_reversed_permuted": "the reversed ratios on the wrong layers"},
    ),
    "Darcy flow, 225 samples, by name": ArmTable(
        _FLOW,
        Cell(f"{_FLOW}/darcy_beta100_40", "darcy_beta100_fno_40"),
        {
            "off": "plain Adam",
            "head_slower": "no alpha: head 0.32",
            "skips_faster": "no alpha: skip convolutions 3",
        },
    ),
    "Darcy flow, 450 samples": ArmTable(
        _FLOW,
        Cell(f"{_FLOW}/darcy_beta100_20", "darcy_beta100_fno_20"),
        _DARCY_CONTROLS,
    ),
    "Darcy flow, UNet": ArmTable(_FLOW, Cell(f"{_FLOW}/darcy_beta100_unet", "darcy_beta100_unet_40"), _DARCY),
    "messages": ArmTable(
        _TUNING,
        Cell(f"{_TUNING}/newsgroups", "newsgroups_minilm_1"),
        {
            **_MESSAGES,
            **_BLOCKS_CONTROLS,
            "head_faster": "no alpha: head twice as fast",
        },
    ),
    "messages, 5 %": ArmTable(
        _TUNING, Cell(f"{_TUNING}/newsgroups_5", "newsgroups_minilm_5"), {**_MESSAGES, **_BLOCKS_CONTROLS}
    ),
    "messages, 5 %, at one rate": ArmTable(
        _TUNING,
        Cell(f"{_TUNING}/newsgroups_5_one_rate", "newsgroups_minilm_5"),
        {**_MESSAGES, **_BLOCKS_CONTROLS},
    ),
    "messages, 10 %": ArmTable(
        _TUNING,
        Cell(f"{_TUNING}/newsgroups_10", "newsgroups_minilm_10"),
        _DIRECTIONS,
    ),
    "messages, LoRA": ArmTable(_TUNING, Cell(f"{_TUNING}/newsgroups_lora", "newsgroups_minilm_1_lora"), _LORA),
    "messages, 5 %, LoRA": ArmTable(
        _TUNING, Cell(f"{_TUNING}/newsgroups_lora_5", "newsgroups_minilm_5_lora"), _LORA
    ),
    "messages, 10 %, LoRA": ArmTable(
        _TUNING,
        Cell(f"{_TUNING}/newsgroups_lora_10", "newsgroups_minilm_10_lora"),
        _DIRECTIONS,
    ),
    "twice the tries": TriesTable(
        "controls",
        "controls/twice_the_tries",
        {
            "language model, 0.07 million parameters": Cell(f"{_MODELS}/variations", "tiny_lm_mini"),
            "language model, 0.86 million": _LM_BIG,
            "0.23 million, half of the steps": Cell(f"{_MODELS}/variations", "tiny_lm_small_200_steps"),
            "0.23 million, Python's standard library as text": Cell(
                f"{_MODELS}/variations", "tiny_lm_small_python"
            ),
            "0.23 million, no weight decay": Cell(f"{_MODELS}/variations", "tiny_lm_small_no_decay"),
            "0.23 million, no warm-up": Cell(f"{_MODELS}/variations", "tiny_lm_small_no_warmup"),
            "transformer, 300 digits": Cell(f"{_IMAGE_TASKS}/digits_vit", "digits_vit_300"),
            "transformer, 1,000 FashionMNIST": _FASHION_VIT,
            "MiniLM, 113 messages": Cell(f"{_TUNING}/newsgroups", "newsgroups_minilm_1"),
            "SmolLM2, 10,240 tokens": Cell(f"{_MODELS}/smollm2", "smollm2_wikipedia_short"),
            "FNO, 225 Darcy flow": Cell(f"{_FLOW}/darcy_beta100_40", "darcy_beta100_fno_40"),
            "FNO, 450 Darcy flow": Cell(f"{_FLOW}/darcy_beta100_20", "darcy_beta100_fno_20"),
        },
    ),
    "SmolLM2": ArmTable(
        _MODELS,
        Cell(f"{_MODELS}/smollm2", "smollm2_wikipedia_short"),
        {
            "off": "plain AdamW",
            "full": "TempBalance, whole matrices",
            "full_reversed": "the same, reversed",
            "slower": "no alpha: all layers 0.893, the mean of the ratios of `full`",
            "full_permuted": "the ratios of `full` on the wrong layers",
        },
    ),
    "cause": ArmTable(
        "cause",
        Cell("cause", "tiny_lm_small"),
        {
            "off": "plain AdamW",
            "factor_2": "**how much faster:** embedding and head 2",
            "embedding_head_faster": "both 5",
            "factor_10": "both 10",
            "factor_25": "both 25",
            "embedding_faster": "**which:** embedding alone 5",
            "head_faster": "head alone 5",
            "after_a_fifth": "**when:** both 5, from a fifth of the steps on",
            "after_half": "both 5, from half of the steps on",
            "initial_embedding_fifth": "**initial embedding:** a fifth of its size",
            "initial_embedding_5": "5 times as large",
            "initial_embedding_25": "25 times as large",
            "initial_embedding_5_faster": "5 times as large, and both 5",
        },
    ),
    "tuned rates": ArmTable(
        "direction",
        _LM_BIG,
        {
            "off": "plain AdamW",
            "small_alpha": "shrunk effects, small alphas faster",
            "small_alpha_permuted": "its ratios on the wrong layers",
            "shrinkage": "shrunk effects, the papers' direction",
            "farms": "the papers' map of FARMS alphas",
            "farms_reversed": "the same, reversed",
            "llr": "LLR, whole matrices",
            "embedding_head_faster": _ENDS_5,
        },
    ),
    "four times the rate": ArmTable(
        "direction",
        Cell("direction/tiny_lm_fast", "tiny_lm_400_fast"),
        {
            "off": "plain AdamW",
            "shrinkage": "shrunk effects, the papers' direction",
            "small_alpha": "the same, small alphas faster",
            "small_alpha_permuted": "its ratios on the wrong layers",
            "queries_slower": "no alpha: queries and keys 0.65",
            "queries_faster": "no alpha: queries and keys 1.35",
        },
    ),
    "default": PairTable(
        "direction",
        "shrinkage",
        "shrunk effects against the papers' map (95 %)",
        {
            "language model, 0.86 million parameters": (_LM_BIG, "farms"),
            "[language model, 0.23 million](../controls/language_models/README.md)": (_LM, "farms"),
            "ResNet-18, 100 digits": (Cell("direction/images_and_fields", "digits_resnet18_100"), "full"),
            "FNO, 50 Darcy samples": (Cell("direction/images_and_fields", "darcy_fno_50"), "full"),
            "[vision transformer, 300 digits](../controls/images/README.md), both at 8e-3": (_VIT, "full"),
            "[ResNet-18, 1,000 FashionMNIST](../controls/images/README.md)": (_FASHION_RESNET, "full"),
            "[vision transformer, 1,000 FashionMNIST](../controls/images/README.md)": (_FASHION_VIT, "full"),
        },
    ),
}
"""The tables by their names."""


def main() -> None:
    """Write all tables."""
    for name, table in TABLES.items():
        page = RESULTS / table.page / "README.md"
        replace_between(page, f"<!-- table {name} -->", END_OF_TABLE, table.markdown(RESULTS))


if __name__ == "__main__":
    main()
