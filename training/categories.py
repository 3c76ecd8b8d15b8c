"""The categories of a run: claimed before the work, opened, and looked through where files are broken."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from datasets.mvtec import Category, Sample, open_category
from datasets.unreadable import leave_out_unreadable, list_all_unreadable
from training.settings import DataSettings
from utils.checkpoint import check_replaceable
from utils.gather import one_per_machine_first
from utils.locks import file_lock, folder_lock
from utils.ownership import claim_folder


@contextlib.contextmanager
def opened_categories(
    data: DataSettings,
    samples_of: Callable[[Category], Sequence[Sample]],
    workers: int,
    results: str | None,
    checkpoint_of: Callable[[str], Path] | None = None,
) -> Iterator[list[Category]]:
    """Within it the run has its categories, and no other run writes where this one does.

    `results` is the folder below each category's results that it writes, `checkpoint_of` gives the checkpoint that it
    writes by category name, `samples_of` what it reads of a category. A broken image ends the run with a list of all
    broken ones, unless they are left out. Raises InputError for files that are not USAD's to replace.
    """
    with contextlib.ExitStack() as locks:
        for name in data.categories:
            if checkpoint_of:
                check_replaceable(checkpoint_of(name))
                locks.enter_context(file_lock(checkpoint_of(name)))
            if results:
                claim_folder(data.results_dir / name / results)
                locks.enter_context(folder_lock(data.results_dir / name / results))
        with one_per_machine_first():
            categories = [open_category(data.root, name, data.decoding) for name in data.categories]
        with list_all_unreadable(categories, samples_of, workers, data.skip_unreadable):
            for category in categories:
                samples = samples_of(category)
                if data.skip_unreadable:
                    leave_out_unreadable(category, samples, workers)
            yield categories
