"""A module that tests run in a process of its own (utils/processes.py)."""

import os

import numpy as np

from utils.errors import InputError
from utils.processes import answer


def work(job: dict) -> int:
    """As the job says: fill some megabytes, fail in some way, or leave."""
    filled = np.ones(job.get("megabytes", 0) * 125_000)
    print("not the result")
    if "input_error" in job:
        raise InputError(job["input_error"])
    if "error" in job:
        raise ValueError(job["error"])
    if "code" in job:
        os._exit(job["code"])
    return len(filled)


if __name__ == "__main__":
    answer(work)
