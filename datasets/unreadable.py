"""Broken images in a data set: all of them named at once, or left out of the run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence

from datasets.mvtec import Category, Item, find_unreadable
from utils import distributed
from utils.command_line import warn
from utils.errors import InputError, UnreadableError

ItemsOf = Callable[[Category], Sequence[Item]]


def leave_out_unreadable(category: Category, items: Sequence[Item], workers: int) -> None:
    """Take those of the category's items that cannot be read out of it, and say how many they are."""
    own = distributed.shard(len(items), 1)
    category.left_out |= distributed.all_entries(find_unreadable(items[own.start : own.stop], workers))
    if category.left_out:
        warn(f"{category.name}: {len(category.left_out)} of {len(items)} images cannot be read and are left out")


@contextlib.contextmanager
def named_at_once(args: argparse.Namespace, categories: Sequence[Category], items_of: ItemsOf) -> Iterator[None]:
    """Where the first broken image ends the run, look at all others, too, and raise InputError that lists them."""
    try:
        yield
    except UnreadableError as error:
        broken = [
            reason for category in categories for reason in find_unreadable(items_of(category), args.workers).values()
        ]
        remedy = "" if args.skip_unreadable else ", or leave out what cannot be read with --skip-unreadable"
        if len(broken) < 2:
            raise InputError(f"{error}{remedy}") from None
        message = f"{len(broken)} images, listed above, cannot be read; repair or remove them{remedy}"
        raise InputError(message, broken) from None
