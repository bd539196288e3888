"""Pickles written to attack the reader: nothing is imported or called, and each is refused or skipped at once."""

from __future__ import annotations

import copyreg
import pickle
import sys
import time
import zipfile
from pathlib import Path
from pickle import (
    APPEND,
    BINGET,
    BINPERSID,
    BINPUT,
    BUILD,
    BYTEARRAY8,
    DUP,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_SET,
    EMPTY_TUPLE,
    EXT1,
    FROZENSET,
    GET,
    GLOBAL,
    INST,
    LONG4,
    MARK,
    NEWOBJ,
    NONE,
    OBJ,
    PERSID,
    POP,
    PROTO,
    REDUCE,
    SETITEM,
    SETITEMS,
    STACK_GLOBAL,
    STOP,
    TUPLE,
    TUPLE1,
    TUPLE2,
    TUPLE3,
)
from struct import pack
from typing import Any

import pytest
import torch

from farms_tb import analyze_checkpoint
from farms_tb.weights import pickled_objects, pickles

START = PROTO + b"\x04"


def text(value: str) -> bytes:
    """Push a string."""
    return pickle.BINUNICODE + pack("<I", len(value.encode())) + value.encode()


def named(module: str, name: str) -> bytes:
    """Push what a pickle names."""
    return GLOBAL + f"{module}\n{name}\n".encode()


def integer(value: int) -> bytes:
    encoded = pickle.encode_long(value)
    return LONG4 + pack("<i", len(encoded)) + encoded


STORAGE = text("storage") + named("torch", "FloatStorage")


def call(function: bytes, *arguments: bytes) -> bytes:
    """Call what `function` pushes."""
    return function + MARK + b"".join(arguments) + TUPLE + REDUCE


def state_dict(*extra: bytes) -> bytes:
    """A dict whose other values are `extra`, next to one tensor of 4 x 3 float32 entries."""
    storage = (
        MARK + text("storage") + named("torch", "FloatStorage") + text("0") + text("cpu") + integer(12) + TUPLE
    )
    shape, stride = integer(4) + integer(3) + TUPLE2, integer(3) + integer(1) + TUPLE2
    hooks = call(named("collections", "OrderedDict"))
    tensor = call(
        named("torch._utils", "_rebuild_tensor_v2"),
        storage + BINPERSID,
        integer(0),
        shape,
        stride,
        pickle.NEWFALSE,
        hooks,
    )
    items = b"".join(text(f"extra{number}") + value for number, value in enumerate(extra))
    return START + EMPTY_DICT + BINPUT + b"\xf0" + MARK + text("a.weight") + tensor + items + SETITEMS + STOP


def with_state(value: bytes, state: bytes, slots: bytes = NONE) -> bytes:
    """Push a value after a BUILD with a state of its dict and its slots."""
    return value + state + slots + TUPLE2 + BUILD


def mapping(key: bytes, value: bytes = NONE) -> bytes:
    """Push a dict of one item."""
    return EMPTY_DICT + key + value + SETITEM


TENSOR = named("torch._utils", "_rebuild_tensor_v2")
META = named("torch._utils", "_rebuild_meta_tensor_no_storage")
FLOAT = named("torch", "float32")
SIZE = named("torch", "Size")
DOUBLED = EMPTY_TUPLE + (DUP + TUPLE2) * 60
"""A tuple of 2^60 leaves in 120 bytes: whoever walks, prints or hashes it never ends."""

LONG = text("k" * 2_000_000)
"""A string that takes a while to copy, search or compare."""

FIRST, SECOND = BINGET + b"\1", BINGET + b"\2"
"""Push what was kept before, at two bytes each."""

SHELL = text("touch touched")
CODE = text("open('touched', 'w')")

ATTACKS: dict[str, bytes] = {
    # Calls.
    "os.system": state_dict(call(named("os", "system"), SHELL)),
    "posix.system": state_dict(call(named("posix", "system"), SHELL)),
    "nested classes": state_dict(call(named("somewhere", "Outer.Inner.__reduce__"), named("os", "system"), SHELL)),
    "eval": state_dict(call(named("builtins", "eval"), CODE)),
    "exec of Python 2": state_dict(call(named("__builtin__", "exec"), CODE)),
    "getattr": state_dict(
        call(call(named("builtins", "getattr"), named("pathlib", "os"), text("system")), SHELL),
    ),
    "getattr of a known function": state_dict(call(named("builtins", "getattr"), TENSOR, text("__globals__"))),
    "dotted name of a known class": state_dict(call(named("collections", "OrderedDict.__class__"), SHELL)),
    "partial": state_dict(call(call(named("functools", "partial"), named("code", "interact")))),
    "map": state_dict(
        call(named("builtins", "list"), call(named("builtins", "map"), named("os", "system"), SHELL))
    ),
    "operator": state_dict(call(named("operator", "methodcaller"), text("system"), SHELL)),
    "torch.hub": state_dict(call(named("torch.hub", "load"), SHELL)),
    "torch.load": state_dict(call(named("torch", "load"), SHELL)),
    "INST": state_dict(MARK + SHELL + INST + b"os\nsystem\n"),
    "OBJ": state_dict(MARK + named("commands", "getoutput") + SHELL + OBJ),
    "NEWOBJ": state_dict(named("subprocess", "Popen") + SHELL + TUPLE1 + NEWOBJ),
    "NEWOBJ of a function": state_dict(TENSOR + EMPTY_TUPLE + NEWOBJ),
    "function rebuilt from its type": state_dict(
        call(named("torch._tensor", "_rebuild_from_type_v2"), named("nt", "system"), NONE, SHELL + TUPLE1, NONE)
    ),
    # Imports.
    "lazy module of torch": state_dict(named("torch", "_dynamo")),
    "module with a side effect": state_dict(named("antigravity", "fly")),
    "names that are none": state_dict(text("") + text("\0\n../x") + STACK_GLOBAL),
    "names that are numbers": state_dict(integer(1) + integer(2) + STACK_GLOBAL),
    "long name": state_dict(text("a." * 100_000) + text("b" * 100_000) + STACK_GLOBAL),
    "terminal escapes in a name": state_dict(named("os\x1b[2J", "x")) + call(named("os", "\x1b]0;x\x07")),
    "extension": state_dict(EXT1 + b"\xf0"),
    "unknown extension": state_dict(EXT1 + b"\xf1"),
    "persistent id of protocol 0": state_dict(PERSID + b"storage\n"),
    "persistent id that is a number": state_dict(integer(1) + BINPERSID),
    "persistent id of a module": state_dict(text("module") + named("os", "path") + text("0") + TUPLE3 + BINPERSID),
    # Changes of what the reader itself is made of.
    "state of a known function": state_dict(
        with_state(TENSOR, mapping(text("planted"), SHELL), mapping(text("__defaults__"), SHELL + TUPLE1))
    ),
    "state of a skipped class": state_dict(with_state(named("a", "B"), mapping(text("full_name"), SHELL))),
    "__setstate__": state_dict(mapping(text("__setstate__"), named("os", "system")) + SHELL + BUILD),
    "items of a known function": state_dict(TENSOR + text("__code__") + NONE + SETITEM),
    "attributes that shadow methods": state_dict(
        with_state(call(named("collections", "OrderedDict")), mapping(text("items"), named("a", "B")))
    ),
    # Sizes.
    "memo that holds itself": state_dict(EMPTY_LIST + BINPUT + b"\1" + BINGET + b"\1" + APPEND, BINGET + b"\xf0"),
    "memo that is not there": state_dict(GET + b"999999999999\n"),
    "deep lists": state_dict(EMPTY_LIST * 100_000 + APPEND * 99_999),
    "deep dicts": state_dict((EMPTY_DICT + text("a")) * 100_000 + NONE + SETITEM * 100_000),
    "deep key": state_dict(mapping(EMPTY_TUPLE + TUPLE1 * 10_000)),
    "deeper key": state_dict(mapping(EMPTY_TUPLE + TUPLE1 * 250_000)),
    "deeper key in a set": state_dict(
        EMPTY_SET + MARK + EMPTY_TUPLE + TUPLE1 * 250_000 + pickle.ADDITEMS,
        MARK + EMPTY_TUPLE + TUPLE1 * 10_000 + FROZENSET,
    ),
    "doubled key": state_dict(mapping(DOUBLED)),
    "doubled key of an old dict": state_dict(MARK + DOUBLED + NONE + pickle.DICT),
    "doubled key of an OrderedDict": state_dict(
        call(named("collections", "OrderedDict"), EMPTY_LIST + DOUBLED + NONE + TUPLE2 + APPEND)
    ),
    "doubled name of a layout": state_dict(call(named("torch.serialization", "_get_layout"), DOUBLED)),
    "doubled key of a storage": state_dict(
        MARK
        + text("storage")
        + named("torch", "FloatStorage")
        + DOUBLED
        + text("cpu")
        + integer(1)
        + TUPLE
        + BINPERSID
    ),
    "doubled shape": state_dict(call(META, FLOAT, DOUBLED, DOUBLED)),
    "keys of one hash": state_dict(
        EMPTY_DICT
        + MARK
        + b"".join(integer(number * sys.hash_info.modulus) + NONE for number in range(60_000))
        + SETITEMS
    ),
    "huge integer": state_dict(integer(1 << 8_000_000)),
    "huge shape": state_dict(
        call(
            META,
            FLOAT,
            MARK + integer(1 << 800_000) + DUP * 15 + TUPLE,
            MARK + integer(1 << 800_000) + DUP * 15 + TUPLE,
        )
    ),
    "one list made a size many times": state_dict(
        EMPTY_LIST + BINPUT + b"\1" + MARK + NONE * 100_000 + pickle.APPENDS,
        *[call(SIZE, BINGET + b"\1")] * 10_000,
    ),
    "one list for many calls": state_dict(
        EMPTY_LIST + BINPUT + b"\1" + MARK + NONE * 100_000 + pickle.APPENDS,
        *[named("a", "B") + BINGET + b"\1" + REDUCE] * 10_000,
    ),
    "one list made a dict many times": state_dict(
        EMPTY_LIST + BINPUT + b"\1" + MARK + (NONE + NONE + TUPLE2) * 20_000 + pickle.APPENDS,
        *[call(named("collections", "OrderedDict"), BINGET + b"\1")] * 5_000,
    ),
    "one tuple made a dict many times": state_dict(
        MARK + (NONE + NONE + TUPLE2) * 20_000 + TUPLE + BINPUT + b"\1",
        *[call(named("collections", "OrderedDict"), FIRST)] * 5_000,
    ),
    "one long name of many classes": state_dict(LONG + BINPUT + b"\1", *[FIRST + FIRST + STACK_GLOBAL] * 60_000),
    "many dicts below a long key": state_dict(
        mapping(LONG, EMPTY_DICT + MARK + b"".join(text(f"{n}") + EMPTY_DICT for n in range(100_000)) + SETITEMS)
    ),
    "many numbers below a long key": state_dict(
        mapping(LONG, EMPTY_DICT + MARK + b"".join(text(f"{n}") + NONE for n in range(100_000)) + SETITEMS)
    ),
    "two long keys, the same": state_dict(
        LONG + BINPUT + b"\1",
        LONG + BINPUT + b"\2",
        mapping(FIRST) + MARK + (SECOND + NONE) * 100_000 + SETITEMS,
    ),
    "two long keys of storages, the same": state_dict(
        LONG + BINPUT + b"\1",
        LONG + BINPUT + b"\2",
        *[MARK + STORAGE + key + NONE + NONE + TUPLE + BINPERSID for key in (FIRST, SECOND)] * 40_000,
    ),
    "memo of one hash": state_dict(
        NONE + b"".join(b"p%d\n" % (number * sys.hash_info.modulus) for number in range(60_000)),
    ),
    "bytes that are not there": state_dict(BYTEARRAY8 + pack("<Q", 1 << 36)),
    "nothing but marks": START + MARK * 100_000 + STOP,
    "pops from nothing": START + POP * 3 + STOP,
}


def write(content: bytes, path: Path) -> Path:
    """Write a file as torch.save does, with `content` for its pickle and one storage of 12 numbers."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/byteorder", b"little")
        archive.writestr("archive/data/0", bytes(torch.randn(12).numpy().tobytes()))
    return path


def called(*_: Any) -> None:
    raise AssertionError("called")


@pytest.fixture(scope="module", autouse=True)
def ordinary_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Read one: what is imported for that is imported now."""
    for legacy in (False, True):
        path = tmp_path_factory.mktemp("ordinary") / "a.pt"
        torch.save({"a.weight": torch.randn(4, 3)}, path, _use_new_zipfile_serialization=not legacy)
        analyze_checkpoint(path)
    assert analyze_checkpoint(write(state_dict(), path)).layers["a"].shape == (1, 4, 3)


@pytest.fixture
def extension() -> Any:
    """Register a function under an extension code, as another package in the process may do."""
    copyreg.add_extension(__name__, "called", 0xF0)
    pickle.loads(pickle.dumps(called, protocol=2))  # Only then it is in the cache.
    yield
    copyreg.remove_extension(__name__, "called", 0xF0)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_is_imported_or_called(
    attack: str, legacy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extension: None
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    if legacy:
        head: list[Any] = [0x1950A86A20F9469CFC6C, 1001, {}]
        start = b"".join(pickle.dumps(value, protocol=2) for value in head)
        path.write_bytes(start + ATTACKS[attack] + pickle.dumps(["0"], protocol=2) + pack("<q", 12) + bytes(48))
    else:
        write(ATTACKS[attack], path)
    modules, functions = set(sys.modules), _functions()
    started = time.process_time()
    try:
        status = analyze_checkpoint(path).layers["a"].shape
    except ValueError as error:
        message = str(error)
        assert "a.pt" in message
        assert len(message) < 2000
    else:
        assert status == (1, 4, 3)
    assert time.process_time() - started < 2  # Under a second on an idle core; what is attacked takes minutes.
    assert set(sys.modules) == modules
    assert _functions() == functions
    assert list(tmp_path.iterdir()) == [path]


def _functions() -> list[tuple[Any, ...]]:
    """What a pickle could change of the functions that it may name."""
    found: list[tuple[Any, ...]] = []
    for module in (pickles, pickled_objects):
        held: list[Any] = list(vars(module).values())
        functions = [value for value in held if callable(value)]
        found += [(f, getattr(f, "__defaults__", None), dict(getattr(f, "__dict__", {}))) for f in functions]
    return found
