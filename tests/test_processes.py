"""Work in a process of its own: its result, its memory, and why there is none."""

import numpy as np
import pytest

from utils.processes import ProcessFailed, run_module, run_python


def test_result_and_memory_are_the_childs():
    ballast = np.ones(1 << 27)  # 1 GB, none of which the other process holds
    small, large = (run_module("tests.child", {"megabytes": megabytes}) for megabytes in (0, 200))
    assert (small.result, large.result) == (0, 200 * 125_000)
    assert 190 < large.memory["host"] - small.memory["host"] < 250
    assert large.memory["host"] < ballast.nbytes / 1e6


@pytest.mark.parametrize(
    ("job", "said"),
    [
        ({"input_error": "the file a.pth is truncated; copy it again"}, "the file a.pth is truncated; copy it again"),
        ({"error": "two\nlines"}, "ValueError: two lines"),
        ({"code": 7}, "its process ended with code 7"),
        ({"code": 0}, "tests.child ended without a result"),
    ],
    ids=["input", "error", "exit", "silence"],
)
def test_the_reason_is_one_line(job, said):
    with pytest.raises(ProcessFailed) as failure:
        run_module("tests.child", job)
    assert str(failure.value) == said


def test_a_script_that_fails_gives_its_last_line():
    with pytest.raises(ProcessFailed, match=r"^no such door$"):
        run_python(["-c", "import sys; print('first', file=sys.stderr); sys.exit('no such door')"])
    assert run_python(["-c", "sum(range(10**6))"]) > 0
