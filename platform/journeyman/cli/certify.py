"""``journeyman certify``: the step, and with ``--plan`` how many rows its target needs."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from journeyman.cli import rollout
from journeyman.cli.arguments import add_feedback, add_recipe, command, load
from journeyman.cli.text import table
from journeyman.errors import RecipeError
from journeyman.recipe import Recipe
from journeyman.run_folder import RunFolder

if TYPE_CHECKING:
    from journeyman.certify.planning import PlannedRows

_WORDS = """\
Choose an escalation threshold that carries the recipe's guarantee, and write the policy bundle.

With --plan nothing is read but the recipe: it says how many certify rows the guarantee needs, for
what the threshold is expected to let through. --expected is, of system_agreement, the share of all
requests that the student answers otherwise than the teacher; of selective_agreement, of those that
it answers (--coverage says how many it does); of accuracy, the share that it answers wrong and the
teacher right (--gains: the other way round).
"""

_EXAMPLES = """\
examples:
  journeyman certify my.yaml
  journeyman certify my.yaml --plan
  journeyman certify my.yaml --plan --expected 0.03 --set certify.alpha=0.05
  journeyman certify my.yaml --plan --expected 0.04 --gains 0.09 --set certify.guarantee=accuracy
"""


def add_command(commands: Any, words: str, do: Callable[[argparse.Namespace], int]) -> None:
    """do: the step itself."""

    def certify(options: argparse.Namespace) -> int:
        if options.plan:
            return _plan(options)
        _refuse_plans_options(options)
        run = RunFolder(load(options))
        rollout.check(options, run)
        status = do(options)
        if options.from_feedback:
            rollout.end(options, run)
        return status

    parser = command(commands, "certify", words, certify, _WORDS, _EXAMPLES)
    add_recipe(parser)
    parser.set_defaults(step="certify")
    add_feedback(parser, "certify the student that `journeyman run --from-feedback` trained")
    rollout.add_options(parser)
    parser.add_argument("--plan", action="store_true", help="say how many certify rows are needed")
    for name, what in (
        ("expected", "what the threshold is expected to let through; default some shares of alpha"),
        ("gains", "of accuracy: share that only the student gets right (default 0)"),
        ("coverage", "of selective_agreement: share that the student answers (default 1)"),
        ("chance", "of being certified with so many rows (default 0.9)"),
    ):
        parser.add_argument(f"--{name}", metavar="SHARE", type=float, help=f"with --plan: {what}")


def _refuse_plans_options(options: argparse.Namespace) -> None:
    given = [n for n in ("expected", "gains", "coverage", "chance")
             if getattr(options, n) is not None]  # fmt: skip
    if given:
        raise RecipeError(f"--{given[0]} goes with --plan.")


def _plan(options: argparse.Namespace) -> int:
    from journeyman.certify.planning import EXPECTED_SHARES, Expected, plan_rows

    recipe = load(options)
    settings = recipe.certify
    n_students = len(settings.before) + 1 if settings.each_stage else 1
    n_promises = len(recipe.classes().classes) if settings.per_class else n_students
    alpha = settings.alpha / n_students
    chance = 0.9 if options.chance is None else options.chance
    kind = settings.guarantee
    if options.gains is not None and kind != "accuracy":
        raise RecipeError(f"--gains goes with certify.guarantee: accuracy, got {kind}.")
    if options.coverage is not None and kind != "selective_agreement":
        raise RecipeError(f"--coverage goes with selective_agreement, got {kind}.")
    rates = [share * alpha for share in EXPECTED_SHARES]
    plans = [
        plan_rows(
            kind,
            alpha,
            settings.delta / n_promises,
            Expected(rate=rate, gains=options.gains or 0.0, coverage=options.coverage or 1.0),
            chance,
        )
        for rate in (rates if options.expected is None else [options.expected])
    ]
    each = " for each of the student's answers" if settings.per_class else ""
    each = f" for each of {n_students} students" if settings.each_stage else each
    print(
        f"{kind.replace('_', ' ')} within {100 * alpha:.4g}% at confidence "
        f"{100 * (1 - settings.delta):.4g}%, certified in {100 * chance:.4g}% of draws{each}\n"
    )
    heads = ("expected", "certify rows", "errors among them")
    print(table([heads, *map(_cells, plans)]))
    print(f"\n{_here(recipe)}")
    return 0


def _cells(plan: PlannedRows) -> tuple[str, str, str]:
    rate = f"{100 * plan.expected.rate:.4g}%"
    return (rate, "-", "-") if plan.n is None else (rate, f"{plan.n:,}", f"{plan.errors:.1f}")


def _here(recipe: Recipe) -> str:
    limit = recipe.corpus.limits.get("certify")
    asked = "all rows of that split" if limit is None else f"{limit:,} rows"
    return f"The recipe takes {asked} (corpus.limits.certify). A dash: no number of rows will do."
