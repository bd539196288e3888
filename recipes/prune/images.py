"""Image classifiers of timm, torchvision or your own, scored by their accuracy on a folder of images."""

from __future__ import annotations

import inspect
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from recipes.errors import RecipeError
from recipes.prune.scores import Score

__all__ = ["ImageTask"]


class ImageTask:
    """A network by name with weights from a file, and folders of images. Nothing is downloaded.

    Args:
        model: `net`, a function that makes the network; `path`, the file of its weights.
        calibration: `path` of a folder, `number` of images.
        evaluation: the same; `number` None for all images.
        images: `resize`, `size`, `mean` and `std` of the network's input; `batch_size` and `workers`.

    Raises:
        RecipeError: the weights or the images to evaluate are missing.
    """

    has_loss = False
    """Whether the model gives a loss for a batch of calibration data, by which `method="search"` goes."""

    def __init__(
        self,
        model: Mapping[str, Any],
        calibration: Mapping[str, Any],
        evaluation: Mapping[str, Any],
        images: Mapping[str, Any],
    ) -> None:
        if model["path"] is None:
            raise RecipeError("model.path is missing: pass a file of the network's weights (.pth, .safetensors)")
        self._make, self._path = model["net"], Path(model["path"])
        self._calibration, self._images = calibration, images
        self._evaluation, self._classes = self._loader("evaluation", evaluation, seed=0)

    def load(self) -> nn.Module:
        """Return the network with the weights of the file, in evaluation mode and on the CPU.

        Raises:
            RecipeError: the file holds no weights, or those of another network.
        """
        model: nn.Module = self._make()
        try:
            model.load_state_dict(_weights(self._path))
        except (RuntimeError, TypeError, pickle.UnpicklingError, EOFError) as error:
            reason = " ".join(str(error).split())[:200]
            raise RecipeError(f"model.path={self._path} does not fit the network: {reason}") from error
        return model.eval()

    def batches(self, seed: int) -> list[dict[str, Tensor]]:
        """Return calibration images, drawn by a seed, under the name of the network's first argument.

        Raises:
            RecipeError: there are none.
        """
        with torch.device("meta"):
            argument = next(iter(inspect.signature(self._make().forward).parameters))
        batches, _ = self._loader("calibration", self._calibration, seed)
        return [{argument: images} for images, _ in batches]

    def score(self, model: nn.Module) -> Score:
        """Return the share of evaluation images whose class gets the largest output.

        An image with an output that is NaN counts as a miss; a warning says how many there are.

        Raises:
            RecipeError: there are more or fewer folders than outputs, so that their numbers are not the classes.
        """
        device = next(model.parameters()).device
        hits: list[Tensor] = []
        broken = 0
        with torch.inference_mode():
            for images, labels in self._evaluation:
                outputs = model(images.to(device)).cpu()
                if len(self._classes) != outputs.shape[1]:
                    raise RecipeError(
                        f"evaluation.path has {len(self._classes)} folders and the network {outputs.shape[1]} "
                        "outputs: folders in the order of their names are the classes that it was trained for, an "
                        "empty folder for each that has no images"
                    )
                unknown = outputs.isnan().any(1)  # which argmax takes for the largest
                hits.append((outputs.argmax(1) == labels) & ~unknown)
                broken += int(unknown.sum())
        samples = torch.cat(hits).double()
        if broken:
            message = f"{broken} of {len(samples)} images have outputs that are NaN, and count as misses"
            warnings.warn(message, stacklevel=2)
        accuracy = float(samples.mean())
        error = (accuracy * (1 - accuracy) / len(samples)) ** 0.5
        return Score("accuracy", accuracy, error, samples.numpy())

    def _loader(self, section: str, data: Mapping[str, Any], seed: int) -> tuple[DataLoader[Any], list[str]]:
        """Return batches of so many images of a folder, drawn by a seed, and the names of its classes."""
        if data["path"] is None:
            raise RecipeError(f"{section}.path is missing: pass a folder with a folder of images for each class")
        options = self._images
        steps = [
            transforms.Resize(options["resize"], transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(options["size"]),
            transforms.ToTensor(),
            transforms.Normalize(options["mean"], options["std"]),
        ]
        try:
            found = ImageFolder(data["path"], transforms.Compose(steps), allow_empty=True)
        except FileNotFoundError as error:
            raise RecipeError(f"{section}.path: {error}") from error
        if not found:
            raise RecipeError(f"{section}.path: {data['path']} has folders, and no images in them")
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        chosen = Subset(found, order[: data["number"]].tolist())
        return DataLoader(chosen, options["batch_size"], num_workers=options["workers"]), found.classes


def _weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, plain or as the entry of a training checkpoint; nothing in the file is executed.

    Raises:
        RuntimeError: the file is damaged.
        TypeError: it holds something else.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise RuntimeError(f"it is damaged, or no such file: {error}") from error
    held = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(held, Mapping):
        raise TypeError(f"it holds a {type(held).__name__} in place of weights by name; save net.state_dict()")
    weights: dict[str, Tensor] = held.get("model", held.get("state_dict", held))
    return weights
