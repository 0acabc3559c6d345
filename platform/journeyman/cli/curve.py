"""``journeyman curve``: what fewer labels would have come to."""

from __future__ import annotations

import argparse
from typing import Any

from journeyman.cli.arguments import add_recipe, command, load, positive
from journeyman.cli.text import table

_WORDS = """\
When to stop labeling, and when to stop escalating: train the run's student again on some of its
labels, and see how often it is right on the test rows, alone and in the cascade.

For each number of labels a student learns that many of the train rows: each subset is part of the
next larger one, and all are trained for about as many optimizer steps as the run's own student, so
that they differ by their labels and not by how long they learned. What the cascade needs is fitted
on calibrate rows. The certify rows are not read: nothing is spent of what they can promise, and
nothing is promised here. Where the test rows have no gold, agreement with the teacher is shown.

The run must be certified. A command that is killed goes on where it stopped, and no student is
trained twice; other sizes, seeds or shares may be added later. Each student takes about as long as
`journeyman train` did; that of all labels is there. `journeyman report R` draws the curve on the
run's page.
"""

_EXAMPLES = """\
examples:
  journeyman curve my.yaml                               an eighth, a quarter, half of the labels
  journeyman curve my.yaml --labels 100 200 500
  journeyman curve my.yaml --labels 100 200 --seeds 3    means over three subsets of each size
  journeyman curve my.yaml --escalate 0.2                in place of the run's own share
"""


def add_command(commands: Any) -> None:
    words = "how right student and cascade are by the number of labels: when to stop labeling"
    curve = command(commands, "curve", words, _curve, _WORDS, _EXAMPLES)
    add_recipe(curve)
    curve.add_argument(
        "--labels",
        metavar="N",
        nargs="+",
        type=positive,
        default=[],
        help="numbers of train rows to learn from, all of them besides; default an eighth, a "
        "quarter and a half",
    )
    curve.add_argument(
        "--seeds",
        metavar="N",
        type=positive,
        default=1,
        help="students of each number, each with its own subset, order and first weights (default "
        "1)",
    )
    curve.add_argument(
        "--escalate",
        metavar="SHARE",
        type=_share,
        help="of requests to escalate, the least confident ones, between 0 and 1; default the "
        "share that the run's bundle escalates, or 0.2 where that is nothing or everything",
    )


def _share(text: str) -> float:
    share = float(text)
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return share


def _curve(options: argparse.Namespace) -> int:
    from journeyman import label_curve, steps
    from journeyman.report import by_labels

    run = steps.Run(load(options))
    with run.locked():
        curve = label_curve.draw(
            run,
            options.labels,
            n_seeds=options.seeds,
            share=options.escalate,
            say=lambda text: print(f"curve     {text}", flush=True),
        )
    shown = by_labels.table(curve)
    print(f"\n{shown.caption}\nEscalated: {by_labels.escalated(curve)}.\n")
    print(table([shown.columns, *shown.rows]))
    print()
    print("\n".join(by_labels.words(curve)))
    print(f"\nkept; journeyman report {options.recipe} draws it on the run's page")
    return 0
