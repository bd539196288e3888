"""PDEBench's error measures (Takamoto et al., NeurIPS 2022) for fields on a regular grid.

One layout everywhere: `(B, C, *space)`, one or two dimensions of space. Time-dependent fields `(B, T, C, *space)`
are taken as `flatten(1, 2)`: each channel at each time counts as a channel, as in PDEBench.

Three things are not as in PDEBench's script, so these numbers do not compare with its tables:

- The script scores the frames that the model was given along with the forecast ones. Their error is zero, which
  multiplies its errors by T_out / (T_in + T_out). Here only forecast frames are to be scored.
- The script averages over batches what it computes for each batch, so its conserved and maximum errors depend on
  the batch size. Here they are those of the whole set.
- The script's Fourier errors are means over wavenumbers, in two dimensions over one quadrant of them. Here a band
  holds all wave vectors of its lengths, and the squares of the bands add up to the squared RMSE (Parseval).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = [
    "BANDS",
    "FieldErrors",
    "boundary_rmse",
    "conserved_error",
    "fourier_rmse",
    "max_error",
    "nrmse",
    "nrmse_by_channel",
    "relative_l2",
    "relative_l2_by_sample",
    "rmse",
]

BANDS: dict[str, tuple[int, int | None]] = {"low": (0, 5), "mid": (5, 13), "high": (13, None)}
"""Wavenumbers of each Fourier band, from (included) and to (excluded): 0 to 4, 5 to 12, 13 and above."""


def _error(prediction: Tensor, target: Tensor) -> Tensor:
    """Subtract in at least single precision: half precision has no Fourier transform, and its squares overflow."""
    if prediction.shape != target.shape:
        raise ValueError(
            f"prediction and target must have the same shape (B, C, *space), got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
    dtype = torch.promote_types(target.dtype, torch.float32)
    return prediction.to(dtype) - target.to(dtype)


def _rms(field: Tensor) -> Tensor:
    """Return the root mean square over space, (B, C), of fields (B, C, *space)."""
    return field.flatten(2).square().mean(-1).sqrt()


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """Divide; a target of zeros gives 0 where it is met exactly and infinity where it is not."""
    return torch.where((error == 0) & (size == 0), error, error / size)


def rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Root mean square of the error over space.

    Args:
        prediction: Fields (B, C, *space).
        target: Fields of the same shape.

    Returns:
        Shape (B, C).
    """
    return _rms(_error(prediction, target))


def nrmse_by_channel(prediction: Tensor, target: Tensor) -> Tensor:
    """RMSE over space divided by the target's root mean square.

    Args:
        prediction: Fields (B, C, *space).
        target: Fields of the same shape.

    Returns:
        Shape (B, C). A target of zeros scores 0 where the prediction is zero too, and infinity elsewhere.
    """
    error = _error(prediction, target)
    return _relative(_rms(error), _rms(target.to(error.dtype)))


def nrmse(prediction: Tensor, target: Tensor) -> Tensor:
    """`nrmse_by_channel`, averaged over samples and channels: one number."""
    return nrmse_by_channel(prediction, target).mean()


def relative_l2_by_sample(prediction: Tensor, target: Tensor) -> Tensor:
    """Norm of each sample's error divided by the norm of its target, both over channels and space.

    Args:
        prediction: Fields (B, C, *space).
        target: Fields of the same shape.

    Returns:
        Shape (B,). Targets of zeros score as in `nrmse_by_channel`.
    """
    error = _error(prediction, target)
    norms = (torch.linalg.vector_norm(x.flatten(1), dim=-1) for x in (error, target.to(error.dtype)))
    return _relative(*norms)


def relative_l2(prediction: Tensor, target: Tensor) -> Tensor:
    """`relative_l2_by_sample`, averaged over samples: one number."""
    return relative_l2_by_sample(prediction, target).mean()


def conserved_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of the error over space, that is the error of the total divided by the number of grid points.

    PDEBench takes it of every channel, whether its total is conserved (density) or not (velocity).

    Args:
        prediction: Fields (B, C, *space).
        target: Fields of the same shape.

    Returns:
        Shape (B, C), with its sign.
    """
    return _error(prediction, target).flatten(2).mean(-1)


def max_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Largest absolute error over space.

    Args:
        prediction: Fields (B, C, *space).
        target: Fields of the same shape.

    Returns:
        Shape (B, C).
    """
    return _error(prediction, target).abs().flatten(2).amax(-1)


def boundary_rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """Root mean square of the error over the outermost grid points; corners count once for each side they end.

    Args:
        prediction: Fields (B, C, *space).
        target: Fields of the same shape.

    Returns:
        Shape (B, C).
    """
    error = _error(prediction, target)
    ends = [(dim, end) for dim in range(2, error.ndim) for end in (0, error.shape[dim] - 1)]
    return _rms(torch.cat([error.narrow(dim, end, 1).flatten(2) for dim, end in ends], dim=-1))


def fourier_rmse(prediction: Tensor, target: Tensor) -> Tensor:
    """RMSE of the part of the error within each of the `BANDS` of wavenumbers.

    The wavenumber of a Fourier mode is the length of its wave vector, counted in waves over the domain. As the
    bands cover all of them, the squares of the results add up to the square of `rmse`.

    Args:
        prediction: Fields (B, C, *space).
        target: Fields of the same shape.

    Returns:
        Shape (B, C, bands).
    """
    error = _error(prediction, target)
    power = torch.fft.fftn(error, dim=tuple(range(2, error.ndim)), norm="forward").abs().square()
    waves = [torch.fft.fftfreq(side, device=error.device).mul(side).round() for side in error.shape[2:]]
    squared = torch.stack(torch.meshgrid(*waves, indexing="ij")).square().sum(0)
    ends = [(low**2, torch.inf if end is None else end**2) for low, end in BANDS.values()]
    inside = [(squared >= low) & (squared < end) for low, end in ends]
    return torch.stack([(power * band).flatten(2).sum(-1).sqrt() for band in inside], dim=-1)


class FieldErrors(Metric):
    """Every measure of this module over a set of samples, however it is cut into batches and among processes.

    `compute` returns, under PDEBench's names,

    - `nrmse`, `rmse`, `brmse` (boundary), `frmse_low`, `frmse_mid` and `frmse_high` (Fourier bands), averaged over
      samples and channels;
    - `relative_l2`, averaged over samples;
    - `crmse`, the root mean square over samples of the conserved quantity's error, averaged over channels;
    - `max_error`, the largest over space and samples, averaged over channels.
    """

    full_state_update = False
    averaged = ("nrmse", "relative_l2", "rmse", "brmse", *(f"frmse_{band}" for band in BANDS))

    samples: Tensor
    sums: Tensor
    conserved: Tensor
    largest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("samples", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("sums", torch.zeros(len(self.averaged)), dist_reduce_fx="sum")
        # One number a channel, as many as the first batch has.
        self.add_state("conserved", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("largest", torch.tensor(0.0), dist_reduce_fx="max")

    def update(self, prediction: Tensor, target: Tensor, counted: int | None = None) -> None:
        """Add a batch.

        Args:
            prediction: Fields (B, C, *space).
            target: Fields of the same shape.
            counted: Take the first so many samples, the others being counted elsewhere; None for all.
        """
        averaged = (
            nrmse_by_channel(prediction, target),
            relative_l2_by_sample(prediction, target)[:, None],
            rmse(prediction, target),
            boundary_rmse(prediction, target),
            *fourier_rmse(prediction, target).unbind(-1),
        )
        self.samples = self.samples + len(target[:counted])
        self.sums = self.sums + torch.stack([values[:counted].mean(1).sum() for values in averaged])
        self.conserved = self.conserved + conserved_error(prediction, target)[:counted].square().sum(0)
        # A maximum is the same however often a sample is seen, and that of no sample at all is none.
        self.largest = torch.maximum(self.largest, max_error(prediction, target).amax(0))

    def compute(self) -> dict[str, Tensor]:
        """Return every measure by name."""
        scores = dict(zip(self.averaged, self.sums / self.samples, strict=True))
        scores["crmse"] = (self.conserved / self.samples).sqrt().mean()
        scores["max_error"] = self.largest.mean()
        return scores
