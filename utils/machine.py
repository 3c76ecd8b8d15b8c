"""The machine of a run: processor, memory, versions of the packages that decide the numbers."""

import contextlib
import platform
import sys
from typing import Any

from utils.distributed import size
from utils.packages import installed_version

PACKAGES = ("torch", "torchvision", "timm", "onnxruntime", "numpy")


def environment(device: Any) -> dict[str, Any]:
    """For config.json: versions, device, number of processes, peak memory."""
    versions = {package: version for package in PACKAGES if (version := installed_version(package))}
    cuda = cuda_in_use()
    name = cuda.get_device_name(device) if cuda and str(device).startswith("cuda") else processor()
    return {
        "versions": {"python": platform.python_version(), **versions},
        "device": f"{device} ({name})",
        "processes": size(),
        "peak_memory_mb": peak_memory_mb(),
    }


def cuda_in_use() -> Any:
    """torch.cuda if this process uses a GPU."""
    torch = sys.modules.get("torch")  # a script without PyTorch has no GPU to wait for
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


def _peak_resident_kib() -> float:
    # On Linux getrusage also counts what the parent process held when it started this one.
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return float(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 if sys.platform == "darwin" else peak


def peak_memory_mb() -> dict[str, float]:
    """Peak memory of this process and, with CUDA in use, of PyTorch on the GPU, in MB (10^6 bytes)."""
    peak = {}
    with contextlib.suppress(ImportError):  # Windows has no resource module
        peak["host"] = round(_peak_resident_kib() * 1024 / 1e6, 1)
    if cuda := cuda_in_use():
        peak["gpu"] = round(cuda.max_memory_allocated() / 1e6, 1)
    return peak


def processor() -> str:
    """The processor's name, or its architecture if the system does not know the name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
