"""Make one data file: checked, in parallel, under a progress bar, and going on where a stopped run was.

What a sample is depends on the settings and its number alone, so a file is bitwise the same for any number of
workers and after any number of interruptions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.progress import TextColumn, TimeRemainingColumn

from recipes.children import available_cores
from recipes.console import progress_bar
from recipes.data.cache import Arrays
from recipes.engine import LocalEngine
from recipes.errors import RecipeError
from recipes.generate.cfd1d import CFD1DSpec
from recipes.generate.darcy import DarcySpec
from recipes.generate.files import PartFile, Settings, Spec

__all__ = ["KINDS", "Job", "generate", "recorded_settings"]

KINDS: dict[str, type[Spec]] = {"darcy": DarcySpec, "cfd1d": CFD1DSpec}

VERSION = 1
"""Goes up when the same settings come to mean other samples; a file begun before is not gone on with."""


@dataclass(frozen=True)
class Job:
    """How many samples are made, by how many processes, and where they go.

    Attributes:
        file: The finished file.
        samples: Samples in it.
        workers: Processes, None for one a core.
        overwrite: Whether a finished file of that name may be replaced.
    """

    file: Path
    samples: int = 10_000
    workers: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"samples must be at least 1, got {self.samples}")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be at least 1, or null for one a core, got {self.workers}")


def generate(spec: Spec, job: Job, console: Console) -> None:
    """Make the samples that `<file>.part` lacks, then give the file its name.

    What a sample is depends on the settings and its number alone, not on the workers or on interruptions.

    Args:
        spec: Which samples.
        job: How many, and where.
        console: Shows the progress.

    Raises:
        RecipeError: The file exists, its folder can't be written or is too small, or a `.part` file of other
            settings is in the way.
    """
    _check_target(job)
    with PartFile(job.file, spec, job.samples, recorded_settings(spec, job.samples)) as part:
        missing = part.missing
        with progress_bar(console, TextColumn("left"), TimeRemainingColumn()) as progress:
            bar = progress.add_task("samples", total=job.samples, completed=job.samples - len(missing))
            for done in _write_all(spec, part, missing, job.workers or available_cores()):
                progress.advance(bar, done)
        _check_target(job)  # a download may have brought it meanwhile
        part.finish()


def _check_target(job: Job) -> None:
    """Refuse to replace a finished file unless that is asked for."""
    if job.file.exists() and not job.overwrite:
        raise RecipeError(f"{job.file} exists; choose another file=..., or replace it by overwrite=true")


def recorded_settings(spec: Spec, samples: int) -> Settings:
    """Return what the file's attributes say of how it was made; all that its content depends on.

    Args:
        spec: Which samples.
        samples: How many.
    """
    (kind,) = (name for name, known in KINDS.items() if known is type(spec))
    return {"generator": f"recipes.generate {kind}, version {VERSION}", **asdict(spec), "samples": samples}


def _write_all(spec: Spec, part: PartFile, missing: list[int], workers: int) -> Iterator[int]:
    """Make and write the samples that are missing; yield the number of samples of each batch that is written."""
    if not missing:
        return
    share = math.ceil(len(missing) / workers)
    batch = min(spec.batch, share)  # smaller than asked for where some worker would get none
    tasks = list(_ranges(missing, batch))
    for task, arrays in _make_samples(spec, tasks, min(workers, len(tasks))):
        part.write(task.start, arrays)
        yield len(task)


def _ranges(indices: Sequence[int], longest: int) -> Iterator[range]:
    """Cut increasing numbers into ranges of consecutive ones, none longer than `longest`.

    >>> list(_ranges([0, 1, 2, 5, 6], 2))
    [range(0, 2), range(2, 3), range(5, 7)]
    """
    for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):  # the same for consecutive ones
        numbers = [index for _, index in run]
        end = numbers[-1] + 1
        for start in range(numbers[0], end, longest):
            yield range(start, min(start + longest, end))


def _make_samples(spec: Spec, tasks: Sequence[range], workers: int) -> Iterator[tuple[range, Arrays]]:
    """Make samples in worker processes of one thread each, and yield each task with its samples as they get done.

    The solvers' libraries would start a thread for each core, in every process. With one thread each the processes
    share the cores, and a sample is bitwise the same whichever process makes it.
    """
    waiting = list(tasks)
    with LocalEngine(workers) as engine:
        while waiting or engine.tasks:
            while waiting and len(engine.tasks) < engine.slots:
                task = waiting.pop(0)
                engine.submit(task, spec.make, task)
            for outcome in engine.finished(timeout=1.0):
                if outcome.failure:
                    raise RecipeError(
                        f"samples {outcome.task} failed: {outcome.failure}; run the same command again to go on, "
                        "with fewer workers=... where memory is short"
                    )
                yield cast(range, outcome.task), outcome.result
