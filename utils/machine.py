"""The machine of a run: processor, memory, versions of the packages that decide the numbers."""

import contextlib
import platform
import sys
from typing import Any

from utils import distributed
from utils.packages import installed_version

PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "numpy")


def environment(device: Any) -> dict[str, Any]:
    """For config.json: versions, device, number of processes, peak memory."""
    versions = {package: version for package in PACKAGES if (version := installed_version(package))}
    cuda = cuda_in_use()
    processor = _fact("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()
    name = cuda.get_device_name(device) if cuda and str(device).startswith("cuda") else processor
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{device} ({name})",
        "processes": distributed.size(),
        "peak_memory_mb": peak_memory_mb(),
    }


def cuda_in_use() -> Any:
    """torch.cuda if this process uses a GPU."""
    torch = sys.modules.get("torch")  # a script without PyTorch has no GPU to wait for
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _fact(path: str, name: str) -> str | None:
    """What Linux says of `name` in one of its files; None on other systems."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8") as lines:
        return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def peak_memory_mb() -> dict[str, float]:
    """Peak memory of this process and, with CUDA in use, of PyTorch on the GPU, in MB (10^6 bytes)."""
    peak = {}
    with contextlib.suppress(ImportError):  # Windows has no resource module
        if found := _fact("/proc/self/status", "VmHWM"):  # getrusage also counts what the parent process held
            size = 1024 * float(found.split()[0])
        else:
            import resource

            size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak["host"] = round(size / 1e6, 1)
    if cuda := cuda_in_use():
        peak["gpu"] = round(cuda.max_memory_allocated() / 1e6, 1)
    return peak
