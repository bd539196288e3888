"""A trained model from a folder, whole or with adapters (LoRA), and its tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import load_file
from torch import nn

from recipes.errors import RecipeError
from recipes.finetune.encoding import Tokens
from recipes.finetune.heads import HEADS
from recipes.finetune.tasks import Task
from recipes.real import minilm_folder

__all__ = ["ModelOptions", "load_network", "load_tokens", "load_weights"]


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is trained; the section `model` of the settings.

    Attributes:
        path: a folder that transformers can read, or a name of the Hugging Face hub; None for the MiniLM of
            `make real`.
        hub: allow a download of what is not in the cache of the hub.
        length: most tokens of an input.
        lora: LoRA's `rank`, `alpha`, `dropout` and `targets`, endings of the names of layers. With rank None all
            weights are trained.
    """

    path: str | None
    hub: bool
    length: int
    lora: Mapping[str, Any]

    @property
    def source(self) -> str:
        """The folder or the name to load.

        Raises:
            RecipeError: MiniLM is not there.
        """
        return str(minilm_folder()) if self.path is None else self.path


def load_tokens(options: ModelOptions) -> Tokens:
    """Load the tokenizer of a model.

    Raises:
        RecipeError: there is none.
    """
    tokenizer = _loaded(transformers.AutoTokenizer, options)
    return Tokens(tokenizer, options.length)


def load_network(options: ModelOptions, task: Task, classes: Sequence[str]) -> nn.Module:
    """Load a model with a new head, drawn from torch's global seed.

    Args:
        options: which model.
        task: what it will predict.
        classes: names of the classes; empty where numbers or spans are predicted.

    Raises:
        RecipeError: the model is not there, or LoRA lacks PEFT or finds no layer.
    """
    head = HEADS[task.kind]
    settings: dict[str, Any] = {"ignore_mismatched_sizes": True}  # a head for other classes is drawn anew
    if task.kind == "classes":
        settings["num_labels"] = len(classes)
    if task.kind == "number":
        settings |= {"num_labels": 1, "problem_type": "regression"}
    model: nn.Module = _loaded(getattr(transformers, head.auto_class), options, **settings)
    model.float()  # whatever the files have: small steps would be rounded away in bfloat16
    if options.lora["rank"] is None:
        return model
    return _with_adapters(model, options.lora, head.peft_type)


def _loaded(auto_class: Any, options: ModelOptions, **settings: Any) -> Any:
    """Load a part of a model, quietly: transformers warns that the head is new."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    try:
        return auto_class.from_pretrained(options.source, local_files_only=not options.hub, **settings)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"model.path={options.source} can't be loaded ({reason}); give a folder with the model, or allow the "
            "download with model.hub=true"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def _with_adapters(model: nn.Module, lora: Mapping[str, Any], task_type: str) -> nn.Module:
    """Freeze a model but for its head, and add LoRA to some of its layers."""
    try:
        import peft
    except ImportError as error:
        raise RecipeError(
            "model.lora needs peft: pip install 'farms-tb[finetune]', or model.lora.rank=null"
        ) from error
    settings = peft.LoraConfig(
        task_type=task_type,
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=list(lora["targets"]),
    )
    try:
        return peft.get_peft_model(model, settings)  # type: ignore[arg-type]
    except ValueError as error:
        raise RecipeError(f"model.lora: {error}") from error


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Put the weights of a checkpoint of the Trainer into the model.

    Args:
        model: the model; with LoRA, the checkpoint holds adapters and head alone.
        checkpoint: the folder of the checkpoint.
    """
    adapters = checkpoint / "adapter_model.safetensors"
    if not adapters.exists():
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
        return
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(model, load_file(adapters))
