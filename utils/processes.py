"""A Python module or script in a process of its own: what it gave, how long it took, how much memory."""

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import InputError
from utils.machine import peak_memory_mb

ROOT = Path(__file__).resolve().parents[1]


class ProcessFailed(RuntimeError):
    """A process ended without a result. The message is its last line on stderr, or its exit code."""


class Finished(NamedTuple):
    result: Any
    memory: dict[str, float]  # peak in MB: "host" and "gpu"


def run_python(words: Sequence[Any], python: Path | str = sys.executable) -> float:
    """Run `python WORDS…` in the project's folder; returns its seconds. Raises ProcessFailed."""
    start = time.perf_counter()
    command = [str(word) for word in (python, *words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ProcessFailed(lines[-1] if lines else f"its process ended with code {done.returncode}")
    return time.perf_counter() - start


def run_module(module: str, job: Any, python: Path | str = sys.executable) -> Finished:
    """Run a module that ends in `answer(work)`, and give `work(job)`; both are plain JSON. Raises ProcessFailed."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, answer_file = Path(folder, "job.json"), Path(folder, "answer.json")
        job_file.write_text(json.dumps(job), encoding="utf-8")
        run_python(["-m", module, job_file], python)
        if not answer_file.exists():
            raise ProcessFailed(f"{module} ended without a result")
        return Finished(**json.loads(answer_file.read_text(encoding="utf-8")))


def answer(work: Callable[[Any], Any]) -> None:
    """The other side of `run_module`: hand the job to `work` and its result back."""
    job_file = Path(sys.argv[1])
    try:
        result = work(json.loads(job_file.read_text(encoding="utf-8")))
    except InputError as error:
        sys.exit(str(error))
    except Exception as error:
        traceback.print_exc()
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:300])
    content = {"result": result, "memory": peak_memory_mb()}
    job_file.with_name("answer.json").write_text(json.dumps(content), encoding="utf-8")
