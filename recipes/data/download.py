"""Download PDEBench's data files: `python -m recipes.data.download NAME...`, or `all`, or `list`.

The files come from DaRUS, the data repository of the University of Stuttgart (https://doi.org/10.18419/darus-2986),
and go to `<data_dir>/pdebench`. A download that was stopped goes on where it stopped when the command is repeated.
A file gets its name once its MD5 checksum is right; until then it is called `<name>.download`.

The files are large and the server is busy at times, so a connection that breaks is taken up again, with growing
pauses, as long as attempts bring bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from recipes.command import user_errors
from recipes.console import make_console
from recipes.errors import RecipeError

__all__ = ["FILES", "FOLDER", "DataFile", "download", "main"]

SERVER = "https://darus.uni-stuttgart.de/api/access/datafile"
FOLDER = "pdebench"  # below the data folder
BLOCK = 1 << 20
TIMEOUT = 60.0  # seconds without a byte
ATTEMPTS = 6  # in a row that bring nothing
FIRST_PAUSE = 1.0  # seconds before the second attempt; doubles each time
BUSY = (408, 429, 500, 502, 503, 504)  # answers worth another attempt


@dataclass(frozen=True)
class DataFile:
    """A file that the server has.

    Attributes:
        file_name: What it is called here.
        url: Where it is.
        md5: Its checksum, in hexadecimal.
        size: Its size in bytes, without the few kilobytes that HDF5 adds to the data.
    """

    file_name: str
    url: str
    md5: str
    size: int


def _darcy(beta: str, identifier: int, md5: str) -> DataFile:
    """Return the file of one source `beta`: 10 000 coefficients and solutions on 128x128 points, float32."""
    size = 10_000 * 2 * 128**2 * 4
    return DataFile(f"2D_DarcyFlow_beta{beta}_Train.hdf5", f"{SERVER}/{identifier}", md5, size)


FILES = {
    "darcy_beta0.01": _darcy("0.01", 133217, "d05c287d4c0b7d3178b0097084238251"),
    "darcy_beta0.1": _darcy("0.1", 133218, "294f9a03a4aa16b0e386469ca8b471be"),
    "darcy_beta1.0": _darcy("1.0", 133219, "81694ed31306ff2e5f6b76349b0b4389"),
    "darcy_beta10.0": _darcy("10.0", 133220, "a7f23cf8011fc211b180828af39b7d1a"),
    "darcy_beta100.0": _darcy("100.0", 133221, "7c09f3b1bb097737d3fd52ffb0c6f1c8"),
    "cfd1d": DataFile(
        "1D_CFD_Rand_Eta0.01_Zeta0.01_periodic_Train.hdf5",
        f"{SERVER}/164672",
        "2fdd00138f1d7abc794fb953021a9f43",
        10_000 * 3 * 101 * 1024 * 4,
    ),
    "cfd2d": DataFile(
        "2D_CFD_Rand_M0.1_Eta0.01_Zeta0.01_periodic_128_Train.hdf5",
        f"{SERVER}/164687",
        "5b21dcccaef4d2145ca579a71153c580",
        10_000 * 4 * 21 * 128**2 * 4,
    ),
}


class _DroppedError(Exception):
    """The connection broke, or the server is busy: another attempt may help."""


def download(files: Sequence[DataFile], folder: Path) -> None:
    """Download what is missing, one file after the other, under a progress bar.

    Args:
        files: The files.
        folder: Where they go; created.

    Raises:
        RecipeError: The folder can't be made, the disk is too small, the server does not send the file, or its
            checksum is wrong.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError(f"{folder} can't be made ({error}); choose another folder with --data-dir") from error
    absent = [file for file in files if not (folder / file.file_name).exists()]
    _check_space(absent, folder)
    console = make_console()
    for file in files:
        path = folder / file.file_name
        console.print(f"{file.size / 1e9:.1f} GB: {escape(str(path))}", soft_wrap=True)
        with _progress_bars(console) as progress:
            if path.exists():
                _check_present(path, file, progress)
            else:
                _Download(file, path, progress).run()
        console.print("[green]whole, with the right checksum[/green]")


def _progress_bars(console: Console) -> Progress:
    """Return bars that are gone at the end; none where the output goes to a file."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _check_space(files: Sequence[DataFile], folder: Path) -> None:
    """Refuse a disk without room for what is still to come; a download that was begun has a part of it."""
    needed = sum(file.size - _size(_part(folder / file.file_name)) for file in files)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RecipeError(
            f"{folder.resolve()} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed; "
            "make room, or choose another folder with --data-dir"
        )


def _part(path: Path) -> Path:
    """Return the name of an unfinished download; the generator calls its unfinished files `.part`."""
    return path.with_name(path.name + ".download")


def _size(path: Path) -> int:
    """Return the bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _checksum(path: Path, progress: Progress) -> str:
    """Return the MD5 checksum of a file, in hexadecimal, with a bar for the reading.

    MD5 is what the server publishes; it finds damage, and is no protection from forgery.
    """
    digest = hashlib.md5(usedforsecurity=False)
    with progress.open(path, "rb", description="checking") as file:
        while block := file.read(BLOCK):  # a file may be larger than the memory
            digest.update(block)
    return digest.hexdigest()


def _check_present(path: Path, file: DataFile, progress: Progress) -> None:
    """Refuse a file of the right name and other content, such as one that the generator has made."""
    found = _checksum(path, progress)
    if found != file.md5:
        raise RecipeError(
            f"{path} is there, but not the file that is published (MD5 {found}, published {file.md5}); "
            "move it away and repeat the command"
        )


class _Download:
    """One file on its way.

    What has come so far is in `part`, and that file is the only memory of the download: its size says where to go
    on, in this command or in a later one.

    Args:
        file: The file.
        path: Its place once it is whole.
        progress: Shows the bars.
    """

    def __init__(self, file: DataFile, path: Path, progress: Progress) -> None:
        self.file = file
        self.path = path
        self.part = _part(path)
        self.progress = progress
        self.bar = progress.add_task("fetching", total=file.size)

    def run(self) -> None:
        """Fetch, check, rename."""
        self._fetch()
        found = _checksum(self.part, self.progress)
        if found != self.file.md5:
            self.part.unlink()
            raise RecipeError(
                f"{self.file.url} brought other bytes than published (MD5 {found}, published {self.file.md5}); "
                "they were deleted. Repeat the command"
            )
        self.part.replace(self.path)

    def _fetch(self) -> None:
        """Attempt until the last byte is there, or `ATTEMPTS` in a row have brought nothing."""
        failures = 0  # attempts in a row that have brought nothing
        most = _size(self.part)
        while True:
            try:
                self._attempt(_size(self.part))
                return
            except _DroppedError as error:
                failures += 1
                size = _size(self.part)
                if size > most:
                    failures = 0
                    most = size
                if failures == ATTEMPTS:
                    raise RecipeError(
                        f"{self.file.url} cannot be reached ({error}); "
                        "repeat the command later, it goes on where it stopped"
                    ) from error
            time.sleep(FIRST_PAUSE * 2 ** max(failures - 1, 0))

    def _attempt(self, start: int) -> None:
        """Ask for the bytes from `start` on, and keep what comes; a `_DroppedError` says that not all came."""
        request = Request(self.file.url, headers={"User-Agent": "farms_tb"})
        if start:
            request.add_header("Range", f"bytes={start}-")
        try:
            response = urlopen(request, timeout=TIMEOUT)
        except HTTPError as error:
            self._refused(error, start)
            return
        except (OSError, http.client.HTTPException) as error:
            raise _DroppedError(str(error)) from error
        with response:
            if response.headers.get_content_type() == "text/html":
                raise RecipeError(
                    f"{self.file.url} answers with a web page instead of the file; open it in a browser to see why"
                )
            if response.status != 206:  # the server ignored the range, and sends everything
                start = 0
            self._receive(response, start)

    def _refused(self, error: HTTPError, start: int) -> None:
        """Sort out what another attempt may solve; return where nothing is missing any more."""
        with error:
            if error.code == 416 and start > 0:  # no byte from there on: the part is whole or too long
                if error.headers.get("Content-Range") == f"bytes */{start}":
                    return
                self.part.unlink()
                raise _DroppedError(f"there was more of it than the server has, {start} bytes")
            if error.code in BUSY:
                raise _DroppedError(f"the server answers {error.code} {error.reason}")
            raise RecipeError(f"{self.file.url}: the server answers {error.code} {error.reason}")

    def _receive(self, response: http.client.HTTPResponse, start: int) -> None:
        """Write the body of an answer to the part, behind its first `start` bytes."""
        length = response.headers.get("Content-Length")
        total = None if length is None else start + int(length)
        self.progress.update(self.bar, completed=start, total=total)
        try:
            with self.part.open("ab" if start else "wb") as out:
                while block := _read(response):
                    out.write(block)
                    self.progress.advance(self.bar, len(block))
        except OSError as error:
            raise RecipeError(
                f"{self.part}: {error.strerror}; once that is solved, repeat the command, "
                "it goes on where it stopped"
            ) from error
        received = _size(self.part)
        if total is not None and received < total:
            raise _DroppedError(f"the connection broke after {received} of {total} bytes")


def _read(response: http.client.HTTPResponse) -> bytes:
    """Read the next bytes of a body, apart from the writing: an OSError of the disk is no broken connection."""
    try:
        return response.read(BLOCK)
    except (OSError, http.client.HTTPException) as error:
        raise _DroppedError(str(error)) from error


def _print_list() -> None:
    """Print the files that can be named, with their sizes."""
    table = Table("name", "file", title="PDEBench's data files", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("GB", justify="right")
    for name, file in FILES.items():
        table.add_row(name, file.file_name, f"{file.size / 1e9:.1f}")
    make_console().print(table)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line; show the user's mistakes without a traceback."""
    parser = argparse.ArgumentParser(prog="python -m recipes.data.download", description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"all, list, or some of {', '.join(FILES)}")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="data folder of the recipes (data)")
    options = parser.parse_args(arguments)
    if "list" in options.names:
        return _print_list()
    names = list(dict.fromkeys(options.names))
    if "all" in names:
        names = list(FILES)
    unknown = [name for name in names if name not in FILES]
    if unknown:
        parser.error(f"no file is called {', '.join(unknown)}; there are {', '.join(FILES)}")
    folder = options.data_dir / FOLDER
    with user_errors():
        try:
            download([FILES[name] for name in names], folder)
        except KeyboardInterrupt:
            make_console(stderr=True).print("[yellow]stopped; repeat the command to go on[/yellow]")
            raise


if __name__ == "__main__":
    main()
