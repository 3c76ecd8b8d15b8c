"""Tables of what can be chosen by name; the module behind a name is imported when it is first used."""

import importlib
from collections import UserDict
from typing import Any


class Registry(UserDict):
    """Name -> "module:attribute", such as "models.branches.patchcore:PatchCore"; names are known without imports."""

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = self.data[name].partition(":")
        return getattr(importlib.import_module(module), attribute)
