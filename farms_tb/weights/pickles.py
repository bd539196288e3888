"""Interpret the pickle in a file by `torch.save` without executing anything that it names.

A pickle is a small program that builds objects, and can call any function of any package. Here it is run by an
interpreter whose vocabulary is `farms_tb.weights.pickled_objects`: tensors and plain containers. Whatever else it
names (classes of configuration libraries, paths, optimizers) becomes a `Skipped`, an object without behaviour.

Promised for every file, whoever made it: nothing is imported, no foreign function is called, no object of the
program is changed, and the time grows with the size of the file alone (see `tests/weights/test_attacks.py`).
"""

from __future__ import annotations

import pickle
from typing import Any, BinaryIO

import torch

from farms_tb.weights.pickled_objects import (
    MAX_NAME,
    Skipped,
    Storage,
    StorageType,
    called,
    named,
    put,
    skipped,
)

_RUNS_PROGRAMS = ("os", "posix", "nt", "subprocess", "pty", "socket", "shutil", "runpy", "importlib", "webbrowser")
_BUILTINS_THAT_RUN = ("eval", "exec", "compile", "open", "__import__", "input", "breakpoint")

_MAX_MEMO = 2**31


class RefusedError(ValueError):
    """The pickle names something that no checkpoint needs; the message is its full name."""


class Interpreter(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """Runs a pickle with nothing but tensors and plain containers in its vocabulary.

    The interpreter in Python is used: the one in C takes memory for as many entries as a number in the file says.
    Each instruction that would touch an object's class, attributes or hash is replaced, see the end of this
    module. Those left push plain values, build lists and tuples of them, and keep them for later.

    Attributes:
        storages: those that the pickle has named so far, by their keys.
    """

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global of the pickle; nothing is imported.

        Raises:
            RefusedError: it runs programs. Skipping it would be safe too, and would hide what the file is.
        """
        # Known names are shorter. Of a long one, each use would take as long as its characters.
        module, name = module[:MAX_NAME], name[:MAX_NAME]
        module = "builtins" if module == "__builtin__" else module
        root = module.partition(".")[0]
        if root in _RUNS_PROGRAMS or (root == "builtins" and name in _BUILTINS_THAT_RUN):
            raise RefusedError(skipped(module, name).full_name)
        return named(module, name)

    def persistent_load(self, pid: Any) -> Storage:
        """Return the storage that a tensor's entries are in.

        Args:
            pid: `("storage", storage type, key, device, number of entries)`, as torch writes it.

        Raises:
            RefusedError: the pickle is of protocol 0, which torch never writes.
            pickle.UnpicklingError: `pid` is something else.
        """
        if isinstance(pid, str):
            raise RefusedError("a pickle of protocol 0")
        if not isinstance(pid, tuple) or len(pid) < 5:
            raise pickle.UnpicklingError("a reference to something else than a storage")
        kind, storage_type, key = pid[:3]
        names_storage = isinstance(storage_type, StorageType) and isinstance(key, str)
        if not names_storage or not isinstance(kind, str) or kind != "storage" or len(key) > MAX_NAME:
            raise pickle.UnpicklingError("a reference to something else than a storage")
        storage = Storage(key, storage_type.dtype or torch.uint8)
        self.storages[key] = storage
        return storage

    def get_extension(self, code: int) -> None:
        """Refuse a registered extension: any package in the process may have registered any function."""
        raise RefusedError(f"extension {code}")


def _call(interpreter: Any) -> None:
    """REDUCE, NEWOBJ: call a function or class with a tuple."""
    arguments = interpreter.stack.pop()
    interpreter.stack[-1] = called(interpreter.stack[-1], arguments)


def _call_with_keywords(interpreter: Any) -> None:
    """NEWOBJ_EX: no known function takes keywords."""
    interpreter.stack.pop()
    _call(interpreter)


def _call_by_name(interpreter: Any) -> None:
    """INST: call a class by name, with what lies above the mark."""
    module = interpreter.readline()[:-1].decode("ascii")
    name = interpreter.readline()[:-1].decode("ascii")
    arguments = interpreter.pop_mark()
    interpreter.append(called(interpreter.find_class(module, name), arguments))


def _call_first(interpreter: Any) -> None:
    """OBJ: call the class above the mark, with what lies above it."""
    cls, *arguments = interpreter.pop_mark()
    interpreter.append(called(cls, arguments))


def _drop_state(interpreter: Any) -> None:
    """BUILD: attributes of an object. No container or tensor has any that are needed."""
    interpreter.stack.pop()


def _append(interpreter: Any) -> None:
    """APPEND: put one item into a list."""
    item = interpreter.stack.pop()
    _extend(interpreter.stack[-1], [item])


def _append_all(interpreter: Any) -> None:
    """APPENDS: put what lies above the mark into a list."""
    items = interpreter.pop_mark()
    _extend(interpreter.stack[-1], items)


def _extend(sequence: Any, items: list[Any]) -> None:
    if isinstance(sequence, Skipped):
        return
    if not isinstance(sequence, list):
        raise pickle.UnpicklingError("an item of something that is no list")
    sequence.extend(items)


def _put(interpreter: Any) -> None:
    """SETITEM: put one item into a dict."""
    value = interpreter.stack.pop()
    key = interpreter.stack.pop()
    put(interpreter.stack[-1], key, value)


def _put_all(interpreter: Any) -> None:
    """SETITEMS: put the pairs above the mark into a dict."""
    items = interpreter.pop_mark()
    _put_pairs(interpreter.stack[-1], items)


def _dict(interpreter: Any) -> None:
    """DICT: make a dict of the pairs above the mark."""
    items = interpreter.pop_mark()
    found: dict[Any, Any] = {}
    _put_pairs(found, items)
    interpreter.append(found)


def _put_pairs(mapping: Any, items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        put(mapping, key, value)


def _empty_set(interpreter: Any) -> None:
    """EMPTY_SET: no weight is in a set, and its members would have to be hashed."""
    interpreter.append(skipped("builtins", "set"))


def _frozen_set(interpreter: Any) -> None:
    """FROZENSET: as EMPTY_SET."""
    interpreter.pop_mark()
    _empty_set(interpreter)


def _drop_members(interpreter: Any) -> None:
    """ADDITEMS: members of a set."""
    interpreter.pop_mark()


def _byte_array(interpreter: Any) -> None:
    """BYTEARRAY8: take memory for the bytes that there are, not for those that the file claims."""
    length = int.from_bytes(interpreter.read(8), "little")
    interpreter.append(interpreter.read(length))


def _keep(interpreter: Any) -> None:
    """PUT: keep the last object under a number in decimal digits; larger ones could have one hash."""
    number = int(interpreter.readline()[:-1])
    if not 0 <= number < _MAX_MEMO:
        raise pickle.UnpicklingError("an impossible place to keep an object")
    interpreter.memo[number] = interpreter.stack[-1]


Interpreter.dispatch = {
    **pickle._Unpickler.dispatch,  # type: ignore[attr-defined]
    pickle.REDUCE[0]: _call,
    pickle.NEWOBJ[0]: _call,
    pickle.NEWOBJ_EX[0]: _call_with_keywords,
    pickle.INST[0]: _call_by_name,
    pickle.OBJ[0]: _call_first,
    pickle.BUILD[0]: _drop_state,
    pickle.APPEND[0]: _append,
    pickle.APPENDS[0]: _append_all,
    pickle.SETITEM[0]: _put,
    pickle.SETITEMS[0]: _put_all,
    pickle.DICT[0]: _dict,
    pickle.EMPTY_SET[0]: _empty_set,
    pickle.FROZENSET[0]: _frozen_set,
    pickle.ADDITEMS[0]: _drop_members,
    pickle.BYTEARRAY8[0]: _byte_array,
    pickle.PUT[0]: _keep,
}
