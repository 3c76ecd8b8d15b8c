"""The settings of a class: its constructor's arguments after the first, kept as attributes under their names."""

import inspect
import typing
from collections.abc import Mapping
from types import NoneType
from typing import Any

from utils.errors import InputError

KINDS = bool, int, float, str


def names(kind: type) -> list[str]:
    return [name for name in list(inspect.signature(kind).parameters)[1:] if name != "image_size"]


def types(kind: type) -> dict[str, type]:
    """The types of the settings, by annotation or else by default; raises InputError for others than KINDS."""
    hints, parameters = typing.get_type_hints(kind.__init__), inspect.signature(kind).parameters
    found = {}
    for name in names(kind):
        hint = hints.get(name, type(parameters[name].default))
        found[name], *others = {*(typing.get_args(hint) or [hint])} - {NoneType} or {NoneType}
        if others or found[name] not in KINDS or parameters[name].kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            raise InputError(f"{kind.__name__}: annotate its setting '{name}' as bool, int, float or str (or None)")
    return found


def restored(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings as their types; raises KeyError, TypeError or ValueError if they cannot be."""
    known, parameters = types(kind), inspect.signature(kind).parameters
    optional = {name for name in known if parameters[name].default is None}
    return {name: None if value is None and name in optional else known[name](value) for name, value in values.items()}


def kept(thing: Any) -> dict[str, Any]:
    """The settings of an object, as plain JSON values; raises InputError if one is not kept."""
    values = {name: getattr(thing, name, thing) for name in names(type(thing))}
    for name, value in values.items():
        if not isinstance(value, (*KINDS, NoneType, dict, list)):
            raise InputError(f"{type(thing).__name__}: keep its setting '{name}' as self.{name}, as it was given")
    return values
