"""Reading pickles that hold data and nothing else.

Unpickling calls whatever the file names, so a pickle from the internet is a
program. This one knows containers, numbers, strings, bytes and NumPy arrays of
numbers, and builds the arrays itself; every other name is refused before it is
imported. Format: Python's `pickletools`.
"""

from __future__ import annotations

import io
import math
import mmap
import pickle
import re
import struct
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

_LARGE = 1 << 20
_DTYPE = re.compile(r"[biuf](1|2|4|8)|[SU]\d{1,4}")


class BadPickle(ValueError):
    """A pickle that is damaged or refused; `kind` is for `Faults.found`."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class _Forbidden(Exception):
    """What the pickle asks for, in words."""


def load_pickle(buffer: bytes | mmap.mmap, where: object) -> Any:
    """What a pickle of any protocol holds; Python 2's byte strings become str, as Latin-1.

    Bytes of a MiB and more are not copied: arrays made of them are read-only views
    of `buffer`. `where` names the file in messages. BadPickle: damaged ("cut
    file"), or with anything but data ("forbidden pickle").

    >>> load_pickle(pickle.dumps({"labels": [3], "data": np.eye(2)}), "a")["data"][1]
    array([0., 1.])
    >>> import os
    >>> load_pickle(pickle.dumps(os.system), "b")
    Traceback (most recent call last):
        ...
    subfleet.datasets.pickles.BadPickle: b asks for 'posix.system', which is not data, ...
    """
    try:
        found = _Unpickler(buffer).load()
        if not _is_whole(found):
            raise ValueError("it ends before the values of an array")
        return found
    except _Forbidden as error:
        raise BadPickle(
            "forbidden pickle",
            f"{where} asks for {error}, which is not data, and is refused: loading it could run "
            "any program; pickles may hold containers, numbers, strings, bytes and NumPy arrays. "
            "Fetch the file again from its publisher",
        ) from None
    except Exception as error:  # damaged opcodes lead nearly anywhere
        reason = str(error) or type(error).__name__
        raise BadPickle(
            "cut file",
            f"{where} is no whole pickle ({reason}); it is cut short or damaged: fetch it again",
        ) from None


def _is_whole(value: Any) -> bool:
    """Whether nothing is left in it of what an array is made from."""
    if isinstance(value, dict):
        return all(map(_is_whole, value)) and all(map(_is_whole, value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return all(map(_is_whole, value))
    return not isinstance(value, _Pending) and not callable(value)


def map_file(path: Path) -> bytes | mmap.mmap:
    """The file's bytes, mapped: memory is used for what is looked at."""
    with path.open("rb") as stream:
        if path.stat().st_size == 0:
            return b""
        return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)


class _Pending:
    """An array or a dtype whose state has not come yet; `code` is None for an array."""

    __slots__ = ("code",)

    def __init__(self, code: str | None = None) -> None:
        self.code = code


def _array_type(*args: object) -> None:
    raise ValueError(f"an array out of {len(args)} arguments and no values")


def _reconstruct(kind: object, shape: object, code: object) -> _Pending:
    if kind is not _array_type:
        raise _Forbidden("an array of a class of its own")
    return _Pending()


def _dtype(code: object, align: object = False, copy: object = False) -> _Pending:
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        raise _Forbidden(f"an array of type {code!r}")
    return _Pending(code)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    if encoding not in ("latin1", "latin-1", "utf-8"):
        raise _Forbidden(f"the encoding {encoding!r}")
    return text.encode(encoding)


def _scalar(dtype: np.dtype, raw: str | bytes) -> Any:
    return np.frombuffer(_raw(raw), dtype, 1)[0]


def _frombuffer(raw: Any, dtype: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
    return _filled(shape, dtype, order == "F", raw)


def _bytes(*args: object) -> bytes:
    if args:
        raise _Forbidden("bytes out of other things")
    return b""


def _raw(raw: Any) -> bytes | memoryview:
    if isinstance(raw, str):
        return raw.encode("latin1")  # Python 2's byte string
    if not isinstance(raw, (bytes, bytearray, memoryview)):
        raise _Forbidden("an array of objects")
    return bytes(raw) if isinstance(raw, bytearray) else raw


def _filled(shape: Any, dtype: Any, fortran: Any, raw: Any) -> np.ndarray:
    """The array of a state, after the check that its bytes are as many as it needs."""
    if not isinstance(dtype, np.dtype):
        raise ValueError("an array without a type")
    if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array of shape {shape!r}")
    data, count = _raw(raw), math.prod(shape)
    if len(data) != count * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} in {len(data)} bytes")
    if count == 0:
        return np.empty(shape, dtype)
    return np.frombuffer(data, dtype, count).reshape(shape, order="F" if fortran else "C")


_NAMES: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("numpy", "ndarray"): _array_type,
    ("numpy", "dtype"): _dtype,
}
for _core in ("numpy.core", "numpy._core"):
    _NAMES[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _NAMES[f"{_core}.multiarray", "scalar"] = _scalar
    _NAMES[f"{_core}.numeric", "_frombuffer"] = _frombuffer
for _builtins in ("builtins", "__builtin__"):
    _NAMES[_builtins, "bytes"] = _bytes
    for _type in (list, dict, tuple, set, frozenset):
        _NAMES[_builtins, _type.__name__] = _type


class _Memo(dict[int, Any]):
    """What a pickle may name again, and under which numbers what is pending stands there."""

    def __init__(self) -> None:
        super().__init__()
        self._keys: dict[int, list[int]] = {}

    def __setitem__(self, key: int, value: Any) -> None:
        super().__setitem__(key, value)
        if isinstance(value, _Pending):
            self._keys.setdefault(id(value), []).append(key)

    def complete(self, old: _Pending, new: Any) -> None:
        """Puts `new` where `old` stands, without a look at the other entries."""
        for key in self._keys.pop(id(old), ()):
            if self[key] is old:  # an entry may have been overwritten since
                super().__setitem__(key, new)


# The standard library's unpickler in Python: unlike the one in C its steps can be replaced.
_Steps: Any = pickle._Unpickler  # pyright: ignore[reportAttributeAccessIssue]


class _Unpickler(_Steps):
    dispatch: ClassVar[dict[int, Any]] = dict(_Steps.dispatch)

    def __init__(self, buffer: bytes | mmap.mmap) -> None:
        self._buffer = buffer
        self._stream = buffer if isinstance(buffer, mmap.mmap) else io.BytesIO(buffer)
        self._stream.seek(0)
        super().__init__(self._stream, encoding="latin1")
        self.memo = _Memo()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise _Forbidden(repr(f"{module}.{name}")) from None

    def load_reduce(self) -> None:
        args = self.stack.pop()
        called = self.stack[-1]
        if not any(called is known for known in _NAMES.values()):
            raise _Forbidden(f"a call of {called!r:.60}")
        self.stack[-1] = called(*args)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:
        state = self.stack.pop()
        old = self.stack[-1]
        if not isinstance(old, _Pending):
            raise _Forbidden(f"a state for {old!r:.60}")
        if old.code is None:
            shape, dtype, fortran, raw = state[-4:]
            new: Any = _filled(shape, dtype, fortran, raw)
        else:
            if state[1] not in "<>=|" or any(part is not None for part in state[2:5]):
                raise _Forbidden(f"an array of records {state!r:.60}")
            new = np.dtype(old.code).newbyteorder(state[1])
        self.stack[-1] = new
        self.memo.complete(old, new)

    dispatch[pickle.BUILD[0]] = load_build

    def _payload(self, form: str) -> Any:
        (length,) = struct.unpack(form, self.read(struct.calcsize(form)))
        # Inside a frame the bytes have been read already.
        if length < _LARGE or self._unframer.current_frame is not None:
            return self.read(length)
        start = self._stream.tell()
        if start + length > len(self._buffer):
            raise EOFError(f"it ends {start + length - len(self._buffer)} bytes too early")
        self._stream.seek(start + length)
        return memoryview(self._buffer)[start : start + length]

    def load_binstring(self) -> None:
        data = self._payload("<I")
        self.append(data if isinstance(data, memoryview) else data.decode("latin1"))

    dispatch[pickle.BINSTRING[0]] = load_binstring

    def load_binbytes(self) -> None:
        self.append(self._payload("<I"))

    dispatch[pickle.BINBYTES[0]] = load_binbytes

    def load_binbytes8(self) -> None:
        self.append(self._payload("<Q"))

    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    dispatch[pickle.BYTEARRAY8[0]] = load_binbytes8

    # Extensions may have been registered, and loaded, by anyone.
    for _code in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        del dispatch[_code[0]]
