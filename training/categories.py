"""The categories of a run: claimed and opened before the work, and searched for broken files if there are any."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from datasets.images import Decoding
from datasets.loading import leave_out_unreadable, list_all_unreadable
from datasets.mvtec import Category, Sample, open_category
from training.settings import DataSettings
from utils.checkpoint import check_replaceable
from utils.files import claim_folder
from utils.gather import one_per_machine_first
from utils.locks import file_lock, folder_lock


@contextlib.contextmanager
def opened_categories(
    data: DataSettings,
    samples_of: Callable[[Category], Sequence[Sample]],
    workers: int,
    bit_depths: Mapping[str, int],
    results: str | None,
    checkpoint_of: Callable[[str], Path] | None = None,
) -> Iterator[list[Category]]:
    """The opened categories; during the block no other run writes to the same places.

    The run writes the folder `results` below each category's results, and the checkpoint that `checkpoint_of` gives for
    a category's name; it reads what `samples_of` gives, 16-bit files with the category's bit depth if that is among
    `bit_depths`. A broken image ends the run with a list of all broken ones, unless they are left out. Raises
    InputError if it would replace files that USAD did not write.
    """

    def decoding_of(name: str) -> Decoding:
        return dataclasses.replace(data.decoding, bit_depth=bit_depths.get(name, data.decoding.bit_depth))

    with contextlib.ExitStack() as locks:
        for name in data.categories:
            if checkpoint_of:
                check_replaceable(checkpoint_of(name))
                locks.enter_context(file_lock(checkpoint_of(name)))
            if results:
                claim_folder(data.results_dir / name / results)
                locks.enter_context(folder_lock(data.results_dir / name / results))
        with one_per_machine_first():
            categories = [open_category(data.root, name, decoding_of(name)) for name in data.categories]
        with list_all_unreadable(categories, samples_of, workers, data.skip_unreadable):
            for category in categories:
                samples = samples_of(category)
                if data.skip_unreadable:
                    leave_out_unreadable(category, samples, workers)
            yield categories
