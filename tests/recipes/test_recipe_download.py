"""Downloads from a server on this machine that behaves, and from ones that do not."""

from __future__ import annotations

import hashlib
import resource
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from recipes.data import download as module
from recipes.data.download import FILES, DataFile, download, main
from recipes.data.pdebench import PDEBenchDarcy
from recipes.errors import RecipeError
from tests.recipes.pdebench_files import write_darcy

CONTENT = np.random.default_rng(0).bytes(3_000_000)
MD5 = hashlib.md5(CONTENT).hexdigest()


@dataclass
class Server:
    """Sends `content`, with whatever is wrong in the next of `faults`.

    A fault is the number of bytes after which the connection is cut, an HTTP status, or "page", "wrong" (other
    bytes), "everything" (ignores the range), "half" (so does this, and is cut), "chunked" (of a length not told),
    "redirect".
    """

    content: bytes = CONTENT
    faults: list[Any] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer one request."""
        wanted = handler.headers["Range"]
        self.ranges.append(wanted)
        fault = self.faults.pop(0) if self.faults else None
        body, start = self.content, int(wanted[len("bytes=") : -1]) if wanted else 0
        if fault == "redirect":
            handler.send_response(303)
            handler.send_header("Location", "/elsewhere")
            handler.end_headers()
        elif isinstance(fault, int) and 400 <= fault < 600:
            handler.send_error(fault)
        elif fault == "page":
            self._send(handler, 200, b"<html>please sign in</html>", {"Content-Type": "text/html; charset=utf-8"})
        elif fault == "wrong":
            self._send(handler, 200, bytes(len(body)))
        elif fault == "chunked":
            self._send_chunks(handler, body)
        elif fault in ("everything", "half"):
            self._send(handler, 200, body, cut=len(body) // 2 if fault == "half" else None)
        elif start:
            if start >= len(body):
                self._send(handler, 416, b"", {"Content-Range": f"bytes */{len(body)}"})
            else:
                told = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
                self._send(handler, 206, body[start:], told, cut=fault)
        else:
            self._send(handler, 200, body, cut=fault)

    def _send(
        self,
        handler: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        handler.send_response(status)
        told = {"Content-Type": "application/x-hdf5", "Content-Length": str(len(body)), **(headers or {})}
        for name, value in told.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body[:cut])

    def _send_chunks(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        half = len(body) // 2
        for part in (body[:half], body[half:], b""):
            handler.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        handler.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Callable[..., DataFile]]]:
    """A server, and the maker of files that come from it."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.answer(self)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def file(name: str = "x.hdf5", md5: str = MD5, size: int = len(CONTENT)) -> DataFile:
            return DataFile(name, f"http://127.0.0.1:{http.server_port}/{name}", md5, size)

        yield state, file
        http.shutdown()
        thread.join()


def _assert_whole(folder: Path) -> None:
    assert (folder / "x.hdf5").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["x.hdf5"]


def test_downloads(server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, file = server
    download([file()], tmp_path / "new" / "folder")
    _assert_whole(tmp_path / "new" / "folder")
    assert state.ranges == [None]
    assert "whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([1_000_000], [None, "bytes=1000000-"]),
        ([1_000_000, 500_000, 1], [None, "bytes=1000000-", "bytes=1500000-", "bytes=1500001-"]),
        ([0, 503, 0, 429], [None] * 5),
        ([2_000_000, 503, 0], [None, "bytes=2000000-", "bytes=2000000-", "bytes=2000000-"]),
        ([1_000_000, "everything"], [None, "bytes=1000000-"]),
        ([1_000_000, "chunked"], [None, "bytes=1000000-"]),
        (["redirect"], [None, None]),
        ([1_000_000, "redirect"], [None, "bytes=1000000-", "bytes=1000000-"]),
        ([1] * 20, [None, *(f"bytes={n}-" for n in range(1, 21))]),  # each attempt brings something
    ],
    ids=lambda value: ",".join(map(str, value))[:40],
)
def test_goes_on_where_the_connection_broke(
    server: Any, tmp_path: Path, faults: list[Any], ranges: list[str | None]
) -> None:
    state, file = server
    state.faults = faults
    download([file()], tmp_path)
    _assert_whole(tmp_path)
    assert state.ranges == ranges


def test_goes_on_in_another_run(server: Any, tmp_path: Path) -> None:
    state, file = server
    (tmp_path / "x.hdf5.download").write_bytes(CONTENT[:1_234_567])
    download([file()], tmp_path)
    _assert_whole(tmp_path)
    assert state.ranges == ["bytes=1234567-"]


def test_unfinished_file_of_the_generator_is_left_alone(server: Any, tmp_path: Path) -> None:
    """Both go to one folder, under names of their own."""
    state, file = server
    names = "x.hdf5.part", "x.hdf5.part.new"
    for name in names:
        (tmp_path / name).write_bytes(CONTENT[:1000])
    download([file()], tmp_path)
    assert (tmp_path / "x.hdf5").read_bytes() == CONTENT
    assert state.ranges == [None]
    assert all((tmp_path / name).read_bytes() == CONTENT[:1000] for name in names)


def test_part_that_was_whole_already(server: Any, tmp_path: Path) -> None:
    state, file = server
    (tmp_path / "x.hdf5.download").write_bytes(CONTENT)
    download([file()], tmp_path)
    _assert_whole(tmp_path)
    assert state.ranges == [f"bytes={len(CONTENT)}-"]


def test_part_that_is_too_long_starts_anew(server: Any, tmp_path: Path) -> None:
    state, file = server
    (tmp_path / "x.hdf5.download").write_bytes(CONTENT + b"more")
    download([file()], tmp_path)
    _assert_whole(tmp_path)
    assert state.ranges == [f"bytes={len(CONTENT) + 4}-", None]


@pytest.mark.parametrize("start", [0, 1_000_000])
def test_wrong_bytes_leave_nothing(server: Any, tmp_path: Path, start: int) -> None:
    state, file = server
    state.faults = ["wrong"] if start == 0 else []
    if start:
        (tmp_path / "x.hdf5.download").write_bytes(bytes(start))  # of another file: the checksum finds out
    with pytest.raises(RecipeError, match=f"other bytes than published .*, published {MD5}.* deleted"):
        download([file()], tmp_path)
    assert list(tmp_path.iterdir()) == []
    download([file()], tmp_path)
    _assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (404, r"/x\.hdf5: the server answers 404 Not Found"),
        (403, r"/x\.hdf5: the server answers 403 Forbidden"),
        ("page", r"/x\.hdf5 answers with a web page instead of the file"),
    ],
)
@pytest.mark.parametrize("before", [b"", CONTENT[:1000]])
def test_refusals_stop_at_once_and_keep_what_is_there(
    server: Any, tmp_path: Path, fault: Any, message: str, before: bytes
) -> None:
    state, file = server
    state.faults = [fault]
    if before:
        (tmp_path / "x.hdf5.download").write_bytes(before)
    with pytest.raises(RecipeError, match=message):
        download([file()], tmp_path)
    assert len(state.ranges) == 1
    assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("fault", [500, 0])
def test_gives_up_after_attempts_that_bring_nothing(server: Any, tmp_path: Path, fault: int) -> None:
    state, file = server
    state.faults = [1_000_000] + [fault] * 50
    with pytest.raises(RecipeError, match=r"cannot be reached .* goes on where it stopped"):
        download([file()], tmp_path)
    assert len(state.ranges) == 1 + module.ATTEMPTS
    assert (tmp_path / "x.hdf5.download").read_bytes() == CONTENT[:1_000_000]


def test_gives_up_on_a_server_that_starts_anew_and_breaks(server: Any, tmp_path: Path) -> None:
    state, file = server
    state.faults = [1_000_000, *["half", 1, 1] * 50]
    with pytest.raises(RecipeError, match="cannot be reached"):
        download([file()], tmp_path)
    assert len(state.ranges) < 50


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "pdebench").write_text("a file")
    with pytest.raises(RecipeError, match=r"pdebench can't be made .* --data-dir"):
        download([], tmp_path / "pdebench")


def test_no_server(tmp_path: Path, server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pauses.append))
    with pytest.raises(RecipeError, match=r"cannot be reached .*refused"):
        download([DataFile("x.hdf5", "http://127.0.0.1:9/x", MD5, 1)], tmp_path)
    assert pauses == [0.001 * 2**n for n in range(module.ATTEMPTS - 1)]
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_too_small(server: Any, tmp_path: Path) -> None:
    state, file = server
    files = [file("a"), file("b", size=10**18)]
    with pytest.raises(RecipeError, match=r"GB free, 1000000000.0 GB are needed; .* --data-dir"):
        download(files, tmp_path)
    assert state.ranges == []


def test_space_counts_what_is_still_to_come(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = server
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: SimpleNamespace(free=2_000_000))
    with pytest.raises(RecipeError, match=r"0.0 GB are needed"):
        download([file()], tmp_path)
    (tmp_path / "x.hdf5.download").write_bytes(CONTENT[:1_500_000])
    download([file()], tmp_path)
    download([file()], tmp_path)  # nothing to come
    _assert_whole(tmp_path)


def test_disk_that_fills_up(server: Any, tmp_path: Path) -> None:
    _, file = server
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, before[1]))
    try:
        with pytest.raises(RecipeError, match=r"x\.hdf5\.download: File too large; .* goes on where it stopped"):
            download([file()], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "x.hdf5.download").stat().st_size == 2_000_000
    download([file()], tmp_path)
    _assert_whole(tmp_path)


def test_file_that_is_there_is_checked_and_left_alone(server: Any, tmp_path: Path) -> None:
    state, file = server
    (tmp_path / "x.hdf5").write_bytes(CONTENT)
    download([file()], tmp_path)
    (tmp_path / "x.hdf5").write_bytes(b"mine")
    with pytest.raises(RecipeError, match=r"x\.hdf5 is there, but not the file that is published .* move it away"):
        download([file()], tmp_path)
    assert (tmp_path / "x.hdf5").read_bytes() == b"mine"
    assert state.ranges == []


def test_registry() -> None:
    assert (
        len({file.url for file in FILES.values()}) == len({file.md5 for file in FILES.values()}) == len(FILES) == 7
    )
    for name, identifier, md5, size in (
        ("darcy_beta0.01", 133217, "d05c287d4c0b7d3178b0097084238251", 1_310_720_000),
        ("darcy_beta0.1", 133218, "294f9a03a4aa16b0e386469ca8b471be", 1_310_720_000),
        ("darcy_beta1.0", 133219, "81694ed31306ff2e5f6b76349b0b4389", 1_310_720_000),
        ("darcy_beta10.0", 133220, "a7f23cf8011fc211b180828af39b7d1a", 1_310_720_000),
        ("darcy_beta100.0", 133221, "7c09f3b1bb097737d3fd52ffb0c6f1c8", 1_310_720_000),
        ("cfd1d", 164672, "2fdd00138f1d7abc794fb953021a9f43", 12_410_880_000),
        ("cfd2d", 164687, "5b21dcccaef4d2145ca579a71153c580", 55_050_240_000),
    ):
        file = FILES[name]
        assert file.url == f"https://darus.uni-stuttgart.de/api/access/datafile/{identifier}"
        assert (file.md5, file.size) == (md5, size)


# --- the command ------------------------------------------------------------------------------------------------


def test_command_brings_a_file_that_the_recipe_finds(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, file = server
    state.content = write_darcy(tmp_path / "source.hdf5", beta=0.1).read_bytes()
    name = FILES["darcy_beta0.1"].file_name
    served = file(name, hashlib.md5(state.content).hexdigest(), len(state.content))
    monkeypatch.setitem(FILES, "darcy_beta0.1", served)
    data = PDEBenchDarcy(tmp_path / "data", beta=0.1)
    with pytest.raises(RecipeError, match=r"`python -m recipes.data.download darcy_beta0.1 --data-dir") as caught:
        data.prepare_data()
    command = str(caught.value).split("`")[1]
    main(command.split()[3:])
    data.prepare_data()
    assert data.sample_shape == (1, 16, 16)


def test_all_downloads_every_file(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, file = server
    monkeypatch.setattr(module, "FILES", {"a": file("a.hdf5"), "b": file("b.hdf5")})
    main(["all", "--data-dir", str(tmp_path)])
    assert sorted(path.name for path in (tmp_path / "pdebench").iterdir()) == ["a.hdf5", "b.hdf5"]


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list"])
    out = capsys.readouterr().out
    for name, file in FILES.items():
        (line,) = (line for line in out.splitlines() if file.file_name in line)
        assert name in line
        assert f"{file.size / 1e9:.1f}" in line


def test_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["darcy"])
    assert "no file is called darcy; there are darcy_beta0.01, " in capsys.readouterr().err


def test_mistakes_show_without_a_traceback(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, file = server
    state.faults = [404]
    monkeypatch.setattr(module, "FILES", {"a": file("a.hdf5")})
    with pytest.raises(SystemExit, match="2"):
        main(["a", "--data-dir", str(tmp_path)])
    assert "error: http://127.0.0.1" in capsys.readouterr().err


def test_stopped_by_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "download", stop)
    with pytest.raises(SystemExit, match="130"):
        main(["cfd1d", "--data-dir", str(tmp_path)])
    assert "repeat the command to go on" in capsys.readouterr().err
