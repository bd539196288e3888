"""A measurement that a GPU makes in the background, while training goes on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import Thread

import torch

from farms_tb.options import SpectrumOptions
from farms_tb.report import LayerRecord, Report
from farms_tb.spectra.distributed import Team, layers_of_this_process, results_of_all
from farms_tb.spectra.measure import cost, for_own_layers, measure_stacks, report_of
from farms_tb.weights.layers import Layer
from farms_tb.weights.stacks import MatrixStack

BACKGROUND_DEVICES = ("cuda",)
"""Where measuring and training disturb each other less than they would have to wait for each other. On the CPU
both use all cores, and measuring sets the number of threads, which training uses as well."""


class BackgroundMeasurement:
    """Measures copies of the layers' weights, in a thread and on CUDA streams of its own.

    The report is that of `farms_tb.spectra.measure.measure` at the time of construction, whatever becomes of the
    weights meanwhile. Weights on the CPU are measured at once.

    The thread makes no collective call, which might meet one of training on another process: the layers are read
    by the constructor, and the records are gathered by `finish`, both on the thread of training.

    Args:
        layers: the layers, the same on every process.
        options: how alpha is measured.
        histogram: also count each layer's ESD.
        team: the processes that share the layers; None where this one is alone.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        options: SpectrumOptions,
        *,
        histogram: bool = False,
        team: Team | None = None,
    ) -> None:
        self._layers, self._options, self._histogram, self._team = layers, options, histogram, team
        self._records: dict[str, LayerRecord] = {}
        self._error: Exception | None = None
        self._copies = self._copy()
        devices = {stack.matrices.device for stack in self._copies.values()}
        self._streams = [torch.cuda.Stream(device) for device in devices if device.type == "cuda"]  # type: ignore[no-untyped-call]
        for stream in self._streams:
            # The copies are made on the stream of training.
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        self._thread: Thread | None = None
        if any(device.type in BACKGROUND_DEVICES for device in devices):
            self._thread = Thread(target=self._measure, name="farms_tb")
            self._thread.start()
        else:
            self._measure()

    def finish(self) -> Report:
        """Wait for the report; on every process where there are several.

        Raises:
            RuntimeError: the measurement failed on some process; raised on every one.
        """
        self.wait()
        return report_of(results_of_all(self._team, self._own_records), self._layers, self._options)

    def wait(self) -> None:
        """Wait until this process has measured its layers."""
        if self._thread is not None:
            self._thread.join()

    def _own_records(self) -> dict[str, LayerRecord]:
        """Return the records of this process's layers, or raise what went wrong with them."""
        if self._error is not None:
            raise self._error
        return self._records

    def _copy(self) -> dict[str, MatrixStack]:
        """Read every layer, and return copies of the stacks of those that fall to this process.

        An error is kept for `finish`: training goes on until the report is asked for.
        """
        own = layers_of_this_process(self._layers, lambda layer: cost(layer, self._options), self._team)
        try:
            return for_own_layers(self._layers, own, _copies, self._options)
        except Exception as error:
            self._error = error
            return {}

    def _measure(self) -> None:
        """Measure the copies and release them. Runs in the thread, if there is one, on streams of its own."""
        try:
            with ExitStack() as streams:
                for stream in self._streams:
                    streams.enter_context(torch.cuda.stream(stream))
                if self._error is None:
                    stacks = list(self._copies.values())
                    records = measure_stacks(stacks, self._options, histogram=self._histogram)
                    self._records = dict(zip(self._copies, records, strict=True))
        except Exception as caught:
            self._error = caught
        # All that reads the copies is done: the results are on the CPU.
        self._copies = {}


def _copies(stacks: Mapping[str, MatrixStack]) -> dict[str, MatrixStack]:
    """Return copies of stacks, by name."""
    return {name: replace(stack, matrices=stack.matrices.detach().clone()) for name, stack in stacks.items()}
