"""The flags that go on from a present checkpoint. Reading them needs no PyTorch."""

from __future__ import annotations

import argparse

from utils.command_line import Parser
from utils.errors import InputError

PLACES = {"data_root", "category", "models_dir"}  # all that --rollback takes
RUN_FLAGS = PLACES | {  # flags that are no settings of what is learned
    *("results_dir", "max_megapixels", "skip_unreadable", "batch_size", "workers", "device", "precision"),
    *("no_eval", "no_images", "save_maps", "update", "rollback"),
}


def add_update_flags(parser: Parser) -> None:
    """What is done with the present checkpoint."""
    group = parser.add_argument_group("an existing checkpoint")
    group.add_argument(
        "--update",
        action="store_true",
        help="take the new frames of train/good into the present checkpoint, whose settings stay as they are",
    )
    group.add_argument("--rollback", action="store_true", help="put back the checkpoint from before the last --update")


def without_defaults(parser: Parser, args: argparse.Namespace) -> argparse.Namespace:
    """The flags again, those that were not given as None: the checkpoint decides.

    Raises InputError for one that --rollback does not take.
    """
    kept = PLACES if args.rollback else RUN_FLAGS
    parser.set_defaults(**dict.fromkeys(vars(args).keys() - kept))
    args = parser.parse_args()
    for name, value in vars(args).items():
        if args.rollback and value is not None and name not in PLACES | {"rollback"}:
            raise InputError(f"--{name.replace('_', '-')} has no effect with --rollback; leave it out")
    return args
