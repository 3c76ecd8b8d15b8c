"""Packages: which releases are installed, whether requirements.txt allows them, and how to import large ones fast."""

import contextlib
import gc
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from utils.errors import InputError

REQUIREMENTS = Path(__file__).parents[1] / "requirements.txt"


def installed_version(name: str) -> str | None:
    """The release of a package, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_packages(requirements: Path = REQUIREMENTS) -> None:
    """Raise InputError for an installed package out of its range in `requirements`; missing ones may not be needed."""
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    for wanted in filter(None, (line.partition("#")[0].strip() for line in lines)):
        requirement = Requirement(wanted)
        version = installed_version(requirement.name)
        # An early build such as 2.7.0a0+nv25 counts as the release it leads to.
        if version and not requirement.specifier.contains(Version(version).base_version):
            raise InputError(
                f"{requirement.name} {version} is installed, but this program needs {wanted}; "
                f"pip install '{wanted}' puts it right"
            )


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports that make a million objects (PyTorch, timm): looking for garbage takes a fifth of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
