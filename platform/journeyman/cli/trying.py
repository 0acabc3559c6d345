"""``journeyman label --try``: candidates side by side, and the best into the recipe if asked."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from journeyman import cluster, files, recipe
from journeyman.cli.arguments import load
from journeyman.cli.text import table
from journeyman.errors import RecipeError
from journeyman.labels.candidates import Judged, best
from journeyman.progress import LiveLine
from journeyman.recipe import Classes, Recipe, rewriting

ROWS = 300
_NOTHING = "–"
_WEAKER = (
    "No gold labels: candidates are compared by how often they agree with one another, which is\n"
    "weaker: what most of them get wrong counts as right. Label some hundred rows by hand."
)

_TOO_FEW = (
    "{} of the ways could be asked, and without gold labels it takes three to choose, as two agree "
    "with each other alike: mend those that could not be asked, add to labels.candidates, or give "
    "some rows gold labels."
)
_ALONE = (
    "labels.candidates names no other way to ask, so that there is nothing to choose from; add "
    'some, each with what differs: candidates: {other: {prompt: "..."}} (journeyman init writes '
    "two into a new recipe)."
)


def run(options: argparse.Namespace) -> int:
    from journeyman import steps
    from journeyman.labels.trying import OWN, tried, ways

    loaded = load(options)
    n_ways = len(ways(loaded))  # and refused before anything is started
    if options.take and not loaded.classes().candidates:
        raise RecipeError(f"--take: {_ALONE}")
    if options.take:
        _check_is_the_files(Path(options.recipe), loaded)
    current = steps.Run(loaded)
    n_rows = options.rows or ROWS
    with current.locked():
        current.execute("prepare")
        cluster.connect(loaded.cluster)
        with LiveLine() as line:
            of = f"of {n_ways} ways on up to {n_rows} train rows"
            judged = tried(
                loaded,
                current.teacher,
                current.corpus,
                n_rows,
                lambda number, name: line.show(f"label     trying {name}, {number} {of}"),
            )
    print(side_by_side(judged))
    if not loaded.classes().candidates:
        print(f"\n{_ALONE}")
        return 0
    chosen = best(judged, by_order=loaded.report.positive is not None)
    if chosen is None:
        n_asked = sum(bool(one.n) for one in judged)
        if not n_asked:
            raise RecipeError("none of the candidates could be asked; mend the recipe's own first.")
        if options.take:
            raise RecipeError(_TOO_FEW.format(n_asked))
        print(f"\n{_TOO_FEW.format(n_asked)}")
        return 0
    if options.take != "best":
        print(f"\nnext      journeyman label {options.recipe} --try --take best   "
              f"writes {chosen.name} into the recipe")  # fmt: skip
        return 0
    _take(Path(options.recipe), loaded, chosen, judged, OWN)
    print(f"\ntaken     {chosen.name}, in {options.recipe}")
    return 0


def _check_is_the_files(path: Path, tried: Recipe) -> None:
    """That what the command line sets besides candidates does not make it another question, or
    another way to choose."""

    def decides(one: Recipe) -> tuple[Any, ...]:
        teacher = one.teacher
        model = (teacher.model, teacher.revision, teacher.lora, teacher.url)
        asked = (one.classes().asked(), *model, teacher.decisive("truncate"))
        return (*asked, one.corpus, one.report.positive)

    if decides(recipe.load(path)) != decides(tried):
        raise RecipeError(
            f"--take writes into {path}, and --set makes another question of it than the file: put "
            "these settings of labels, teacher, corpus or report into the file first."
        )


def side_by_side(judged: Sequence[Judged]) -> str:
    """The table, and what is to be said of it."""
    heads = ("", "scoring", "rows", "right", "95%", "balanced", "AUC", "ECE", "mass", "agrees",
             "tokens/row", "$/1k rows", "rows/s")  # fmt: skip
    text = table([heads, *(_cells(one) for one in judged)])
    notes = [f"{one.name}: {one.refusal}" for one in judged if one.refusal]
    notes += [f"{one.name}: {one.unanswered} rows are not answered (too long, most likely)"
              for one in judged if one.unanswered and not one.refusal]  # fmt: skip
    if not any(one.accuracy for one in judged):
        notes.append(_WEAKER)
    return "\n".join([text, *([""] if notes else []), *notes])


def _cells(one: Judged) -> tuple[str, ...]:
    if one.refusal:
        return (one.name, one.scoring, *[_NOTHING] * 11)
    right = one.accuracy
    return (
        one.name,
        one.scoring,
        f"{one.n:,}",
        f"{right.rate:.3f}" if right else _NOTHING,
        f"{right.low:.3f}-{right.high:.3f}" if right else _NOTHING,
        *(
            _NOTHING if value is None else f"{value:.3f}"
            for value in (
                one.balanced_accuracy,
                one.auc,
                one.calibration_error,
                one.label_mass,
                one.agreement,
            )
        ),
        f"{one.tokens_per_row:,.0f}",
        f"{1000 * one.dollars_per_row:,.2f}" if one.dollars_per_row else _NOTHING,
        f"{one.rows_per_s:,.1f}",
    )


def _take(path: Path, tried: Recipe, chosen: Judged, judged: Sequence[Judged], own: str) -> None:
    figures = [_evidence(one) for one in (chosen, *(o for o in judged if o is not chosen))]
    today = datetime.datetime.now(datetime.UTC).date()
    comments = [
        f"{chosen.name} was taken by journeyman label --try, {today}, on train rows, of teacher",
        f"{tried.teacher.model}:",
        *(f"  {line}" for line in figures),
    ]
    if tried.report.positive and chosen.auc is not None:
        comments.append(f"Taken by the AUC of {tried.report.positive}.")
    if chosen.accuracy is None:
        comments += ["Without gold labels, which is weaker: what most of them get wrong counts as "
                     "right."]  # fmt: skip
    changes = {} if chosen.name == own else tried.classes().candidates[chosen.name]
    text = rewriting.with_settings(path.read_text("utf-8"), ("labels",), changes, comments)
    if changes:
        text = _kept(text, recipe.load(path).classes(), chosen.name, changes)
    files.write_bytes(path, text.encode())


def _kept(text: str, labels: Classes, taken: str, changes: dict[str, Any]) -> str:
    """The recipe's text with candidates that go on meaning what they meant in the file's labels
    before one of them was taken: each says what differs from the recipe's own way."""
    known = labels.candidates
    whole = labels.model_copy(update={"candidates": {**known, taken: changes}})
    where = ("labels", "candidates")
    for name, added in whole.kept_candidates(taken).items():
        if name in known:
            text = rewriting.with_settings(text, (*where, name), added, [])
        else:
            text = rewriting.with_settings(text, where, {name: added}, [])
    return text


def _evidence(one: Judged) -> str:
    if one.refusal:
        return f"{one.name}: could not be asked"
    if one.accuracy is None:
        return f"{one.name}: agrees with the others on {one.agreement or 0:.3f} of {one.n} rows"
    right = one.accuracy
    figures = (("balanced", one.balanced_accuracy), ("AUC", one.auc),
               ("ECE", one.calibration_error), ("label mass", one.label_mass))  # fmt: skip
    shown = [f"{name} {value:.3f}" for name, value in figures if value is not None]
    shown.append(f"{one.tokens_per_row:,.0f} tokens a row")
    if one.dollars_per_row:
        shown.append(f"${1000 * one.dollars_per_row:,.2f} for 1,000")
    if one.unanswered:
        shown.append(f"{one.unanswered:,} rows unanswered")
    in_words = f"{right.rate:.3f} right of {right.n} ({right.low:.3f} to {right.high:.3f})"
    return f"{one.name}: {in_words}, {', '.join(shown)}"
