"""Broken images in a data set: list all of them, or leave them out of the run."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

from datasets.loading import find_unreadable
from datasets.mvtec import Category, Sample
from utils import distributed
from utils.command_line import warn
from utils.errors import InputError, UnreadableError

SamplesOf = Callable[[Category], Sequence[Sample]]


def leave_out_unreadable(category: Category, samples: Sequence[Sample], workers: int) -> None:
    """Remove samples that cannot be read from the category, and warn how many there are."""
    own = distributed.shard(len(samples), 1)
    for part in distributed.gathered(find_unreadable(samples[own.start : own.stop], workers)):
        category.left_out |= part
    if category.left_out:
        warn(f"{category.name}: {len(category.left_out)} of {len(samples)} images cannot be read and are left out")


@contextlib.contextmanager
def list_all_unreadable(
    categories: Sequence[Category], samples_of: SamplesOf, workers: int, skipped: bool
) -> Iterator[None]:
    """If a broken image ends the run, read all others, too, and raise an InputError that lists every broken one."""
    try:
        yield
    except UnreadableError as error:
        broken = [
            reason for category in categories for reason in find_unreadable(samples_of(category), workers).values()
        ]
        remedy = "" if skipped else ", or leave out what cannot be read with --skip-unreadable"
        if len(broken) < 2:
            raise InputError(f"{error}{remedy}") from None
        message = f"{len(broken)} images, listed above, cannot be read; do what is said of each{remedy}"
        raise InputError(message, broken) from None
