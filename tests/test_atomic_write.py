"""Writing files whole or not at all, whatever stands under the target's name."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from farms_tb.atomic_write import atomic_path, write_text_atomically


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_replaces_a_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    for text in ("first", "second\r\n"):
        write_text_atomically(target, text)
        assert target.read_bytes() == text.encode()
    assert names_in(tmp_path) == ["a.txt"]


def test_an_error_keeps_the_old_file(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "a.txt", "old")

    def fail_halfway() -> None:
        with atomic_path(tmp_path / "a.txt") as path:
            path.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names_in(tmp_path) == ["a.txt"]


def test_each_writer_has_a_file_of_its_own(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a") as one, atomic_path(tmp_path / "a") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "a").read_text() == "one"  # the outer block ends last


def test_links_are_replaced_and_never_followed(tmp_path: Path) -> None:
    precious, link = tmp_path / "precious", tmp_path / "link"
    precious.write_text("mine")
    link.symlink_to(precious)
    write_text_atomically(link, "new")
    assert (precious.read_text(), link.read_text(), link.is_symlink()) == ("mine", "new", False)


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text_atomically(tmp_path / "a", "")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "雪" * 85])
def test_names_as_long_as_the_file_system_takes(tmp_path: Path, name: str) -> None:
    write_text_atomically(tmp_path / name, "long")
    assert (tmp_path / name).read_text() == "long"


def test_targets_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text_atomically(tmp_path / "no" / "a", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_text_atomically(tmp_path / "folder", "")
    with pytest.raises(UnicodeEncodeError):
        write_text_atomically(tmp_path / "a", "\ud800")
    assert names_in(tmp_path) == ["folder"]


def test_devices_are_written_to() -> None:
    write_text_atomically(os.devnull, "nothing")
    assert not Path(os.devnull).is_file()
