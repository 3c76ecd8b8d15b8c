"""Reads pickles and files of torch.save as data: plain values, arrays, tensors. Nothing is ever called.

A pickle is a program. Python's own unpickler runs it, so that even with a short list of admitted names it can
be made to fill the memory or to hang (a dictionary key of nested tuples takes years to hash). Here a small
stack machine follows the program; what it asks to be called is kept as a `Call` and only looked at.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickletools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_OPCODES = 10_000  # a k-means model takes about 200, arrays being one each
MAX_BYTES = 256 << 20

# What may be named, and what it means here. numpy renamed its modules with version 2, scikit-learn with 0.22;
# pickles of protocol 2 write bytes as a call of _codecs.encode; a storage means the type of its numbers.
ADMITTED = {
    **{f"numpy.{core}.multiarray._reconstruct": "array" for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": "buffer" for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": "scalar" for core in ("core", "_core")},
    "numpy.ndarray": "ndarray",
    "numpy.dtype": "dtype",
    "_codecs.encode": "encode",
    "collections.OrderedDict": "dictionary",
    "sklearn.cluster._kmeans.KMeans": "kmeans",
    "sklearn.cluster.k_means_.KMeans": "kmeans",
    "torch._utils._rebuild_tensor_v2": "tensor",
    "torch.HalfStorage": "<f2",
    "torch.FloatStorage": "<f4",
    "torch.DoubleStorage": "<f8",
    "torch.IntStorage": "<i4",
    "torch.LongStorage": "<i8",
}
NUMBERS = ("f2", "f4", "f8", "i4", "i8")

CONSTANTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
FIXED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclasses.dataclass(eq=False)
class Name:
    """An admitted global."""

    meaning: str


@dataclasses.dataclass(eq=False)
class Call:
    """A call that a pickle asks for, with the state it sets afterwards."""

    meaning: str
    args: tuple
    state: Any = None


def loads(data: bytes) -> Any:
    """The value that a pickle of protocol 2 to 5 describes; objects stay `Call`s. Raises ValueError."""
    try:
        return _follow(data)
    except (IndexError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"not a well-formed pickle ({type(error).__name__}: {error})") from None


def _follow(data: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def call(meaning: Name, args: tuple) -> Call:
        if not isinstance(args, tuple):
            raise ValueError("arguments that are no tuple")
        return Call(meaning.meaning, args)

    for count, (opcode, value, _) in enumerate(pickletools.genops(data)):
        if count == MAX_OPCODES:
            raise ValueError(f"more than {MAX_OPCODES} steps")
        match opcode.name:
            case name if name in CONSTANTS:
                stack.append(value)
            case name if name in FIXED:
                stack.append(FIXED[name])
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
            case "APPEND" | "APPENDS" as name:
                items = [stack.pop()] if name == "APPEND" else pop_to_mark()
                _expect(stack[-1], list).extend(items)
            case "SETITEM" | "SETITEMS" as name:
                if name == "SETITEM":
                    marks.append(len(stack) - 2)
                items = pop_to_mark()
                keys = [_expect(key, str) for key in items[::2]]
                _expect(stack[-1], dict).update(zip(keys, items[1::2], strict=True))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_admit(*value.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = _expect(stack.pop(), str), _expect(stack.pop(), str)
                stack.append(_admit(module, attribute))
            case "REDUCE" | "NEWOBJ":
                args = stack.pop()
                stack[-1] = call(_expect(stack[-1], Name), args)
            case "BUILD":
                state = stack.pop()
                _expect(stack[-1], Call).state = state
            case "BINPERSID":
                stack[-1] = call(Name("storage"), stack[-1])
            case "STOP":
                (result,) = stack
                return result
            case name:
                raise ValueError(f"the step {name} is refused")


def _expect(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _admit(module: str, attribute: str) -> Name:
    name = f"{module}.{attribute}"
    if name not in ADMITTED:
        raise ValueError(f"asks for {ascii(name)[1:-1][:100]}, which is refused")
    return Name(ADMITTED[name])


def array(value: Any) -> np.ndarray:
    """The numpy array that a `Call` means, for a scalar one of no dimension. Raises ValueError."""
    match value:
        case Call(meaning="array", state=(_, shape, dtype, fortran, data)):
            order = "F" if fortran else "C"
        case Call(meaning="buffer", args=(data, dtype, shape, "C" | "F" as order)):
            pass
        case Call(meaning="scalar", args=(dtype, data)):
            shape, order = (), "C"
        case _:
            raise ValueError("no numpy array")
    dtype, data = _dtype(dtype), _bytes(data)
    if not _sizes(shape) or math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError("an array whose shape does not fit its data")
    return np.frombuffer(data, dtype).reshape(shape, order=order).astype(dtype.newbyteorder("="))


def _dtype(value: Any) -> np.dtype:
    match value:
        case Call(meaning="dtype", args=(str() as code, *_), state=(_, "<" | ">" as order, *_)):
            if code in NUMBERS:
                return np.dtype(order + code)
    raise ValueError("an array that does not hold plain numbers")


def _bytes(value: Any) -> bytes:
    match value:
        case Call(meaning="encode", args=(str() as text, "latin1")):
            return text.encode("latin1")
    if not isinstance(value, (bytes, bytearray)):
        raise ValueError("an array without its data")
    return bytes(value)


def _sizes(value: Any) -> bool:
    return type(value) is tuple and len(value) <= 4 and all(type(size) is int and size >= 0 for size in value)


class TorchFile:
    """A dictionary written by torch.save (its zip format); a context manager."""

    def __init__(self, path: str | os.PathLike) -> None:
        """Raises ValueError where the file is another, damaged or compressed."""
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
            if isinstance(error, OSError) and error.filename:
                raise
            raise ValueError(f"not written by torch.save, or truncated ({error})") from None
        self.records = {info.filename.partition("/")[2]: info for info in self.archive.infolist()}
        if self._read("byteorder", b"little") != b"little":
            raise ValueError("written on a big-endian machine")
        self.content = _expect(loads(self._read("data.pkl")), dict)

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.archive.close()

    def _read(self, name: str, default: bytes | None = None) -> bytes:
        info = self.records.get(name)
        if info is None:
            if default is None:
                raise ValueError(f"no record {name!a}: not written by torch.save")
            return default
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError("compressed, which torch.save never does")
        try:
            return self.archive.read(info)
        except (zipfile.BadZipFile, EOFError, RuntimeError, NotImplementedError, OSError) as error:
            raise ValueError(f"damaged ({error})") from None

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` of the dictionary, on the CPU. Raises ValueError where it is none of floats."""
        match self.content.get(name):
            case Call(meaning="tensor", args=(Call(meaning="storage", args=stored), offset, size, stride, *_)):
                pass
            case _:
                raise ValueError(f"'{name}' is missing or no tensor")
        match stored:
            case ("storage", Name("<f2" | "<f4" | "<f8" as kind), str() as key, _, int() as count):
                dtype = np.dtype(kind)
            case _:
                raise ValueError(f"'{name}' does not hold floats")
        if not (_sizes((offset,)) and _sizes(size) and _sizes(stride) and len(size) == len(stride)):
            raise ValueError(f"'{name}' has an impossible shape")
        last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
        if last >= count or math.prod(size) > count:
            raise ValueError(f"'{name}' reaches beyond its storage")
        data = self._read(f"data/{key}")
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"'{name}' should have {count * dtype.itemsize} bytes of data, not {len(data)}")
        values = torch.from_numpy(np.frombuffer(data, dtype).copy())
        return values.as_strided(size, stride, offset).contiguous()


def load_pickle(path: Path) -> Any:
    """`loads` for a file of at most 256 MiB."""
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"larger than {MAX_BYTES >> 20} MiB")
    return loads(path.read_bytes())
