"""What a test asks of the machine it runs on: time enough, and packages that may be missing."""

import importlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PATIENCE = 600  # seconds after which something is taken to hang; on a busy machine a process may need minutes


def wait_until(happened: Callable[[], object]) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def require(module: str) -> ModuleType:
    """Import a module, or skip the test; a broken installation counts as none."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # a broken one may raise anything
        pytest.skip(f"{module} cannot be imported: {error}")


def resident(process: int | str = "self") -> float:
    """Memory in MB, or skip the test where /proc does not tell."""
    statm = Path(f"/proc/{process}/statm")
    if not statm.exists():
        pytest.skip("resident memory is read from /proc")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 1e6
