"""Fine-tune a language model on little data: `python -m recipes.finetune experiment=newsgroups_minilm`.

Settings come from `conf/finetune.yaml` through Hydra. `balancing=off|full|farms|model_balancing|...` picks the
arm; any other setting is overridden by its name (`data.fraction=0.05 training.num_train_epochs=3`).
`training.*` are Hugging Face's `TrainingArguments`; `+training.bf16=true` adds one that is not listed.

The run folder holds what those of `python -m recipes.train` do. `summary.json` has the test scores of the epoch
that was best on validation examples (`test/...`) and of the last one (`test_last/...`).
`checkpoints/checkpoint-<steps>` are the Trainer's: the best one can be loaded with `from_pretrained`, and
`ckpt_path=<run folder>/checkpoints/checkpoint-<steps>` with the same overrides resumes a run in its folder.

Exits with status 2 and one sentence when a setting, a folder or a data file is at fault, with 130 after Ctrl-C.
"""

from __future__ import annotations

import hydra
from omegaconf import DictConfig

from farms_tb.missing import cannot_import
from recipes.command import hand_over_hydras_errors, hydra_run, user_errors
from recipes.config import CONFIG_DIR
from recipes.errors import RecipeError
from recipes.finetune.published import register_resolver


@hydra.main(config_path=CONFIG_DIR, config_name="finetune", version_base="1.3")
def _task(cfg: DictConfig) -> None:
    """Fine-tune with the composed settings; a launcher may call this in a process of its own."""
    register_resolver()  # the launcher may have started this process
    with hydra_run():
        try:
            from recipes.finetune.run import finetune
        except ImportError as error:
            raise RecipeError(cannot_import("fine-tuning", error, "pip install 'farms-tb[finetune]'")) from error
        finetune(cfg)


def main() -> None:
    """Run from the command line; show the user's mistakes without a traceback."""
    hand_over_hydras_errors()
    register_resolver()
    with user_errors():
        _task()


if __name__ == "__main__":
    main()
