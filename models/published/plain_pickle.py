"""Follows a pickle without running it; the result is plain values and records of calls.

A pickle is a program, and Python's unpickler runs it. Even if only a few names are admitted, it can fill the memory,
or hang on a dictionary key of nested tuples that takes years to hash. Here it is only read.
"""

import dataclasses
import pickletools
from collections.abc import Collection
from typing import Any

import numpy as np

MAX_STEPS = 10_000  # a k-means model takes about 200, an array being one
PUSHED_AS_READ = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
PUSHED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TAKEN = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "APPEND": 1, "SETITEM": 2}  # values that a step takes from the stack
TAKEN_TO_MARK = {"TUPLE", "APPENDS", "SETITEMS"}
ARRAYS = {
    "_codecs.encode",  # how protocol 2 writes bytes
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
    "numpy.dtype",
    "numpy.ndarray",
}


class Name(str):
    """An admitted name, "module.name"."""


@dataclasses.dataclass(eq=False)
class Call:
    """A call that the pickle asks for: `name(*args)`, with `state` set on the result."""

    name: str
    args: tuple
    state: Any = None


def follow(data: bytes, admitted: Collection[str]) -> Any:
    """The value of a pickle of protocol 2 to 5 that uses no names but the `admitted` ones.

    Raises ValueError if it uses others, is damaged, or has more than MAX_STEPS; IndexError or KeyError if its steps do
    not fit together.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for count, (opcode, value, _) in enumerate(pickletools.genops(data)):
        if count == MAX_STEPS:
            raise ValueError(f"more than {MAX_STEPS} steps")
        name, items = opcode.name, []
        if name in TAKEN or name in TAKEN_TO_MARK:
            start = len(stack) - TAKEN[name] if name in TAKEN else marks.pop()
            if start < 0:
                raise IndexError("too few values")
            items = stack[start:]
            del stack[start:]
        match name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "TUPLE" | "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(items))
            case "APPEND" | "APPENDS":
                _expect(list, stack[-1]).extend(items)
            case "SETITEM" | "SETITEMS":
                keys = [_expect(str, key) for key in items[::2]]
                _expect(dict, stack[-1]).update(zip(keys, items[1::2], strict=True))
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINPUT" | "LONG_BINPUT":
                memo[value] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[value])
            case "GLOBAL":
                stack.append(_admit(value.replace(" ", ".", 1), admitted))
            case "STACK_GLOBAL":
                attribute, module = _expect(str, stack.pop()), _expect(str, stack.pop())
                stack.append(_admit(f"{module}.{attribute}", admitted))
            case "REDUCE" | "NEWOBJ":
                args, function = _expect(tuple, stack.pop()), _expect(Name, stack.pop())
                stack.append(Call(function, args))
            case "BUILD":
                state = stack.pop()
                _expect(Call, stack[-1]).state = state
            case "BINPERSID":
                stack.append(Call("storage", _expect(tuple, stack.pop())))  # how torch.save refers to numbers
            case "STOP":
                (result,) = stack
                return result
            case _ if name in PUSHED_AS_READ:
                stack.append(value)
            case _ if name in PUSHED:
                stack.append(PUSHED[name])
            case _:
                raise ValueError(f"the step {name} is refused")


def _expect(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise ValueError(f"a {type(value).__name__} in the place of a {kind.__name__}")
    return value


def _admit(asked: str, admitted: Collection[str]) -> Name:
    name = asked.replace("numpy._core.", "numpy.core.", 1)  # renamed with numpy 2
    if name not in admitted:
        raise ValueError(f"asks for {ascii(asked)[1:-1][:100]}, which is refused")
    return Name(name)


def array(value: Any) -> np.ndarray:
    """The numpy array that a recorded call makes; a scalar has no dimension. Raises ValueError or TypeError."""
    match value:
        case Call("numpy.core.multiarray._reconstruct", state=(_, shape, dtype, fortran, data)):
            order = "F" if fortran else "C"
        case Call("numpy.core.numeric._frombuffer", args=(data, dtype, shape, "C" | "F" as order)):
            pass
        case Call("numpy.core.multiarray.scalar", args=(dtype, data)):
            shape, order = (), "C"
        case _:
            raise ValueError("no numpy array")
    match dtype:
        case Call("numpy.dtype", args=("f2" | "f4" | "f8" | "i4" | "i8" as code, *_), state=(_, "<" | ">" as end, *_)):
            dtype = end + code
        case _:
            raise ValueError("an array that does not hold plain numbers")
    match data:
        case Call("_codecs.encode", args=(str() as text, "latin1")):
            data = text.encode("latin1")
    return np.frombuffer(data, dtype).reshape(shape, order=order).astype(code)
