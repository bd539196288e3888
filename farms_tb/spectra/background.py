"""A measurement that a GPU makes beside the training it is doing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from threading import Thread

import torch

from farms_tb.options import SpectrumOptions
from farms_tb.report import Report
from farms_tb.spectra.distributed import Team, merged, own_layers
from farms_tb.spectra.measure import cost, read_layers, report_of
from farms_tb.spectra.measurement import measure_stacks
from farms_tb.spectra.rows import ROW_LENGTH
from farms_tb.weights.layers import Layer
from farms_tb.weights.matrices import MatrixStack

# Where measuring and training get in each other's way less than they would have to wait for each other. On the CPU
# both use all cores, and LAPACK's number of threads, which measuring sets, is that of training too.
_DEVICES = ("cuda",)


class MeasurementBeside:
    """Measures copies of the layers' weights, in a thread and on CUDA streams of its own.

    What it finds is that of `farms_tb.analysis.measure` at the time it was made, whatever becomes of the weights
    meanwhile. Where they are on the CPU it is found at once.

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
        self._table = torch.zeros(len(layers), ROW_LENGTH, dtype=torch.float64, device="cpu")
        self._error: Exception | None = None
        self._copies = self._copy()
        devices = {stack.matrices.device for stack in self._copies.values()}
        self._streams = [torch.cuda.Stream(device) for device in devices if device.type == "cuda"]  # type: ignore[no-untyped-call]
        for stream in self._streams:
            # The copies are made on the stream of training.
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        self._thread: Thread | None = None
        if any(device.type in _DEVICES for device in devices):
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
        rows = merged(self._table, self._error, self._layers, self._team)
        return report_of(rows, self._layers, self._options)

    def wait(self) -> None:
        """Wait until this process has measured its layers."""
        if self._thread is not None:
            self._thread.join()

    def _copy(self) -> dict[int, MatrixStack]:
        own = own_layers(self._layers, lambda layer: cost(layer, self._options), self._team)
        copies = {}
        for index, stack in read_layers(self._layers):
            if isinstance(stack, Exception):
                self._error = self._error or stack
            elif index in own:
                copies[index] = replace(stack, matrices=stack.matrices.detach().clone())
        return copies

    def _measure(self) -> None:
        try:
            with ExitStack() as streams:
                for stream in self._streams:
                    streams.enter_context(torch.cuda.stream(stream))
                if self._copies and self._error is None:
                    rows = measure_stacks(list(self._copies.values()), self._options, self._histogram)
                    self._table[list(self._copies)] = torch.stack(rows)
        except Exception as caught:
            self._error = caught
        # Not before what reads them is done, which it is: its results are on the CPU.
        self._copies = {}
