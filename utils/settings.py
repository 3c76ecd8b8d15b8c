"""The settings of a class: its constructor's arguments after the first, kept as attributes under their names."""

import inspect
import typing
from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Any

from utils.errors import InputError

KINDS = bool, int, float, str
VARIADIC = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD


def setting_names(kind: type) -> list[str]:
    return [name for name in list(inspect.signature(kind).parameters)[1:] if name != "image_size"]


def setting_types(kind: type) -> dict[str, tuple[type, bool]]:
    """The type of each setting, by annotation or else by default, and whether it may be None instead.

    Raises InputError for others than KINDS.
    """
    try:
        hints, parameters = typing.get_type_hints(kind.__init__), inspect.signature(kind).parameters
    except NameError as error:
        raise InputError(f"{kind.__name__}: {error}; its annotations must be imported at run time, too") from None
    found = {}
    for name in setting_names(kind):
        parameter = parameters[name]
        hint = hints.get(name, type(parameter.default))
        choices = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, UnionType) else {hint}
        own = choices - {NoneType}
        if len(own) != 1 or not own <= set(KINDS) or parameter.kind in VARIADIC:
            raise InputError(f"{kind.__name__}: annotate its setting '{name}' as bool, int, float or str (or None)")
        if parameter.default is inspect.Parameter.empty:
            raise InputError(f"{kind.__name__}: give its setting '{name}' a default")
        found[name] = own.pop(), NoneType in choices or parameter.default is None
    return found


def settings_from(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings as their types; raises KeyError, TypeError or ValueError if they cannot be."""
    known, found = setting_types(kind), {}
    for name, value in values.items():
        own, may_be_none = known[name]
        found[name] = None if value is None and may_be_none else own(value)
    return found


def settings_of(thing: Any) -> dict[str, Any]:
    """The settings of an object, as plain JSON values; raises InputError if one is not kept."""
    values = {name: getattr(thing, name, ...) for name in setting_names(type(thing))}
    for name, value in values.items():
        if not isinstance(value, (*KINDS, NoneType, dict, list)):
            raise InputError(f"{type(thing).__name__}: keep its setting '{name}' as self.{name}, as it was given")
    return values
