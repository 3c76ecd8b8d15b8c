"""The long part of the hardness checks: kills, signals, hostile files, long runs. A table at the end.

python tests/hardness/run.py                                          # everything; hours on two cores
python tests/hardness/run.py --kills 7 --signals 7 --cases 900 --frames 1000
python tests/hardness/run.py --kills 0 --signals 0 --frames 0 --pictures 0 --cases 20000 --findings found
python tests/hardness/run.py --kills 0 --signals 0 --frames 0 --cases 0                 # the camera

Exit code 1 if anything was lost, crashed, hung, or went where it should not. Linux.
"""

import os
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch starts; forked processes must not inherit threads
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from hardness import camera, fuzzing, interruption, long_run  # noqa: E402
from tiny import SMALL_NETWORKS, draw_category, succeed  # noqa: E402
from tqdm import tqdm  # noqa: E402

from utils.command_line import Parser, number, run  # noqa: E402


class Tally:
    """Counts cases by kind, and prints at once what goes wrong."""

    def __init__(self) -> None:
        self.cases: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()

    def add(self, kind: str, wrong: list[str]) -> None:
        self.cases[kind] += 1
        if wrong:
            self.failed[kind] += 1
            tqdm.write(f"{kind}: {'; '.join(wrong)}", file=sys.stderr)

    def table(self) -> str:
        """One row a kind."""
        rows = [("kind of fault", "cases", "failed")]
        rows += [(kind, count, self.failed[kind]) for kind, count in self.cases.items()]
        return "\n".join(f"{kind:<40}{cases:>8}{failed:>8}" for kind, cases, failed in rows)


def main() -> None:
    parser = Parser(__doc__)
    count = number(int, 0)
    parser.add_argument("--kills", type=count, default=105, help="SIGKILLs, the scripts in turn (default: 105)")
    parser.add_argument("--signals", type=count, default=70, help="SIGINTs and SIGTERMs (default: 70)")
    parser.add_argument("--cases", type=count, default=20_000, help="hostile files of all kinds (default: 20000)")
    parser.add_argument("--frames", type=count, default=10_000, help="frames of the long run (default: 10000)")
    parser.add_argument("--pictures", type=count, default=100_000, help="of a camera with faults (default: 100000)")
    parser.add_argument("--seed", type=count, default=0, help="default: 0")
    parser.add_argument("--findings", type=Path, help="folder for hostile files that went wrong")
    args = parser.parse_args()
    if 0 < args.frames < 2 * long_run.WINDOW:
        parser.error(f"--frames takes 0, or {2 * long_run.WINDOW} and more: fewer do not show whether something grows")
    tally = Tally()
    try:
        with tempfile.TemporaryDirectory() as name:
            work(args, Path(name), tally)
    finally:  # of an interrupted run, too
        print(tally.table(), flush=True)
    sys.exit(tally.failed.total() > 0)


def work(args, folder: Path, tally: Tally) -> None:
    """Everything that the flags ask for."""
    if args.kills or args.signals:
        disturb(args, folder / "scripts", tally)
    if args.cases or args.frames:
        models = train(folder / "trained")
    if args.cases:
        fuzz(args, folder / "files", models / "belt", tally)
    if args.frames:
        words, wrong = long_run.verdict(long_run.measure(folder, models, args.frames))
        print(words)
        tally.add(f"{args.frames} frames through predict.py", wrong)
    if args.pictures:
        measured = camera.watch(folder / "watched", args.pictures)
        print(camera.words(measured))
        tally.add(f"{args.pictures} pictures of a camera", measured.wrong)


def disturb(args, folder: Path, tally: Tally) -> None:
    """Kills and signals."""
    bench, rng = interruption.Bench(folder), random.Random(args.seed)
    for kinds, count in ((["SIGKILL"], args.kills), (["SIGINT", "SIGTERM"], args.signals)):
        kind, numbers = ", ".join(kinds), [signal.Signals[name] for name in kinds]
        for name, wrong in tqdm(bench.disturb(numbers, count, rng), total=count, desc=kind, disable=None):
            tally.add(f"{kind} {name}", wrong)


def train(root: Path) -> Path:
    """The three branches on tiny data; returns the models' folder."""
    draw_category(root / "data" / "belt")
    for script in SMALL_NETWORKS:
        succeed(root, script, "--no-eval")
    return root / "models"


def fuzz(args, folder: Path, models: Path, tally: Tally) -> None:
    """Hostile files, as many of each kind."""
    targets = fuzzing.targets(folder, models)
    share = -(-args.cases // len(targets))
    for kind, target in targets.items():
        cases = fuzzing.campaign(target, share, args.seed, (args.findings or folder / "runs") / kind)
        for wrong in tqdm(cases, total=share, desc=kind, disable=None):
            tally.add(kind, wrong)


if __name__ == "__main__":
    run(main)
