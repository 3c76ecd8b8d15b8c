"""A Python module or script in a process of its own: what it gave, how long it took, how much memory."""

from __future__ import annotations

import json
import os
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
    """A process that reached its end."""

    seconds: float  # wall time from its start to its end
    cpu_seconds: float  # of all its threads; other work on the machine hardly changes it
    result: Any = None
    memory: dict[str, float] | None = None  # peak in MB: "host", "gpu", and by how much "host" has "grown" by the work


def run_python(words: Sequence[Any], python: Path | str = sys.executable, threads: int | None = None) -> Finished:
    """Run `python WORDS…` in the project's folder, with so many threads. Raises ProcessFailed.

    One process at a time: processor time is that of all processes that have ended meanwhile.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)} if threads else None
    start, before = time.perf_counter(), os.times()
    command = [str(word) for word in (python, *words)]
    options = {"capture_output": True, "text": True, "encoding": "utf-8", "errors": "replace"}
    done = subprocess.run(command, cwd=ROOT, env=environment, **options)
    seconds, after = time.perf_counter() - start, os.times()
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise ProcessFailed(lines[-1] if lines else f"its process ended with code {done.returncode}")
    user, system = after.children_user - before.children_user, after.children_system - before.children_system
    return Finished(seconds, user + system)


def run_module(module: str, job: Any, python: Path | str = sys.executable, threads: int | None = None) -> Finished:
    """Run `python -m MODULE JOB.json`, a module that ends in `answer(work)`: `work` of `job`, both plain JSON.

    Raises ProcessFailed where `work` does not get there.
    """
    with tempfile.TemporaryDirectory() as folder:
        job_file, answer_file = Path(folder, "job.json"), Path(folder, "answer.json")
        job_file.write_text(json.dumps(job), encoding="utf-8")
        finished = run_python(["-m", module, job_file], python, threads)
        if not answer_file.exists():
            raise ProcessFailed(f"{module} ended without a result")
        return finished._replace(**json.loads(answer_file.read_text(encoding="utf-8")))


def answer(work: Callable[[Any], Any]) -> None:
    """The other side of `run_module`: hand the job to `work` and its result back."""
    job_file = Path(sys.argv[1])
    start = peak_memory_mb()
    try:
        result = work(json.loads(job_file.read_text(encoding="utf-8")))
    except InputError as error:
        sys.exit(str(error))
    except Exception as error:
        traceback.print_exc()
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:300])
    memory = peak_memory_mb()
    if "host" in memory:
        memory["grown"] = memory["host"] - start["host"]
    job_file.with_name("answer.json").write_text(json.dumps({"result": result, "memory": memory}), encoding="utf-8")
