"""The paper's tables on your data: comparison with other methods, ablation, sensitivity, speed.

python reproduce_tables.py                                           # all four for saved_models/coal_ad
python reproduce_tables.py --category coal_demo --tables ablation,speed
python reproduce_tables.py --tables sensitivity --sweeps lambda_obj,lambda_map --seeds 1 2 3

Writes Markdown, CSV, JSON and plots to <results-dir>/<category>/tables/. Every finished cell is kept there: started
again, the script goes on where it was interrupted.
"""

from pathlib import Path

from experiments import BASELINES, SWEEPS, TABLES
from training.options import add_data_flags, add_fusion_flags, add_models_flag, add_run_flags, add_weights_flags
from utils.command_line import Parser, number, run, some_of
from utils.packages import importing


def main() -> None:
    parser = Parser(__doc__)
    add_data_flags(parser)
    add_models_flag(parser)
    group = parser.add_argument_group("tables")
    group.add_argument("--tables", type=some_of(TABLES), default=list(TABLES), help=f"default: {','.join(TABLES)}")
    text = "mean ± standard deviation over these; what depends on them is fitted again (default: the checkpoints' own)"
    group.add_argument("--seeds", type=number(int, 0, 2**32 - 1), nargs="+", help=text)
    group.add_argument("--sweeps", type=some_of(SWEEPS), help=f"of the sensitivity table (default: {','.join(SWEEPS)})")
    group = parser.add_argument_group("baselines (anomalib)")
    group.add_argument("--baselines", type=some_of(BASELINES), help=f"default: {','.join(BASELINES)}")
    text = "a Python that has anomalib (default: .venv-baselines)"
    group.add_argument("--baselines-python", type=Path, metavar="PATH", help=text)
    add_fusion_flags(parser)
    add_weights_flags(parser)
    add_run_flags(parser)
    args = parser.parse_args()
    for flag, table in (("sweeps", "sensitivity"), ("baselines", "comparison"), ("baselines_python", "comparison")):
        if getattr(args, flag) is not None and table not in args.tables:
            parser.error(f"--{flag.replace('_', '-')} has no effect without the table {table}; leave it out")
    if args.seeds and args.tables == ["speed"]:
        parser.error("--seeds has no effect on the table speed alone; leave it out")
    args.seeds = args.seeds and list(dict.fromkeys(args.seeds))
    args.baselines = args.baselines or list(BASELINES)

    with importing():  # PyTorch takes seconds to import: --help and mistyped flags need none
        from experiments.grid import reproduce

    reproduce(args)


if __name__ == "__main__":
    run(main)
