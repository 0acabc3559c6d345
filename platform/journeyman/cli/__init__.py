"""The ``journeyman`` command. Turns errors of ours into one sentence and exit status 1."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from journeyman import __version__
from journeyman.cli import (
    cascade,
    certify,
    compare,
    curve,
    doctor,
    export,
    init,
    jobs,
    labels,
    results,
    rollout,
    trying,
)
from journeyman.cli.arguments import add_feedback, add_recipe, command, load, positive
from journeyman.errors import JourneymanError, RecipeError
from journeyman.progress import duration
from journeyman.recipe import Recipe

_DESCRIPTION = """\
Distil a large language model into a small one, and serve both as one certified cascade.

  corpus -> prepare -> label -> train -> certify -> serve

A recipe (YAML) describes a distillation; `run` does all of its steps and skips those that are done.
Every step can be stopped at any time and run again: it goes on where it stopped.
"""

_EXAMPLES = """\
examples:
  journeyman init tickets.csv                        a first recipe for a file of your own
  journeyman recipe show jobs/recipes/routing.yaml      every setting, defaults filled in
  journeyman run jobs/recipes/routing.yaml              the whole pipeline
  journeyman run my.yaml --set training.epochs=8     with one setting changed
  journeyman label my.yaml --estimate                what labeling will take, before it is paid for
  journeyman certify my.yaml --plan                  how many rows the promise needs
  journeyman label my.yaml --new                     label again from the start
  journeyman labels stats my.yaml                    what the teacher said, in figures
  journeyman curve my.yaml                           would fewer labels have done as well?
"""

_LABEL = """\
Let the teacher label the corpus, shard by shard. It can be stopped at any time: the same command
goes on where it stopped, and what is finished is never labeled twice.
"""

_LABEL_EXAMPLES = """\
examples:
  journeyman label my.yaml --try --take best         which wording and scoring suit the teacher?
  journeyman label my.yaml --estimate --rows 500     label 500 rows, and price the rest from them
  journeyman label my.yaml                           label; goes on where it stopped
  journeyman label my.yaml --new                     from the start, into a new dataset
  journeyman labels --help                           look at what came of it
"""

_STEPS = {
    "prepare": "turn the sources into corpus shards: ids, splits, exact duplicates collapsed",
    "label": "let the teacher label the corpus, shard by shard; goes on where it stopped",
    "train": "train the student on the labels; goes on at the last checkpoint",
    "certify": "choose an escalation threshold that carries the recipe's guarantee",
    "measure": "serve the cascade and send it the test rows over HTTP",
    "report": "write the run's page",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return options.do(options)
    except JourneymanError as error:
        print(f"journeyman: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `| head` closed the pipe
        sys.stderr.close()
        return 1
    except KeyboardInterrupt:
        print(
            "\njourneyman: stopped; what was finished is kept, and the same command goes on.",
            file=sys.stderr,
        )
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="journeyman",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"journeyman {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    init.add_command(commands)
    run = command(commands, "run", "do every step of a recipe that is not done yet", _run)
    add_recipe(run)
    run.add_argument("--new", action="store_true", help=_NEW)
    add_feedback(run, "train on its escalations too, and certify on its audits")
    rollout.add_options(run)
    for name, words in _STEPS.items():
        if name == "label":
            step = command(commands, name, words, _label, _LABEL, _LABEL_EXAMPLES)
            _add_label_options(step)
        elif name == "certify":
            certify.add_command(commands, words, _step)
            continue
        else:
            step = command(commands, name, words, _step)
        add_recipe(step)
        step.set_defaults(step=name)
    labels.add_commands(commands)
    curve.add_command(commands)
    compare.add_command(commands)
    results.add_command(commands)
    export.add_command(commands)
    cascade.add_commands(commands)
    jobs.add_commands(commands)
    doctor.add_command(commands)
    _recipe_commands(commands)
    return parser


_NEW = "start a new label dataset; the old one is kept as labels.old"
_ESTIMATE_ROWS = 200


def _add_label_options(label: argparse.ArgumentParser) -> None:
    label.add_argument("--new", action="store_true", help=_NEW)
    label.add_argument(
        "--prepare", action="store_true", help="prepare the corpus first, where it is not yet"
    )
    label.add_argument(
        "--estimate",
        action="store_true",
        help="label a sample only, and say how long the whole corpus will take and what it will "
        "cost (by teacher.price); writes nothing",
    )
    label.add_argument(
        "--rows",
        metavar="N",
        type=positive,
        help=f"rows of the sample: with --estimate (default {_ESTIMATE_ROWS}), or with --try "
        f"(default {trying.ROWS})",
    )
    label.add_argument(
        "--try",
        dest="trial",
        action="store_true",
        help="ask in the recipe's way and in each of labels.candidates about the same train rows, "
        "and show accuracy, calibration and cost side by side",
    )
    label.add_argument(
        "--take",
        choices=("best",),
        help="with --try: write the best way into the recipe's file, with its figures",
    )


def _recipe_commands(commands: Any) -> None:
    about = commands.add_parser("recipe", help="look at a recipe: schema, show, check")
    actions = about.add_subparsers(required=True, metavar="ACTION")
    schema = actions.add_parser("schema", help="the JSON Schema of recipes, every key documented")
    schema.set_defaults(do=_recipe_schema)
    show = command(actions, "show", "a recipe as it will run, defaults filled in", _recipe_show)
    add_recipe(show)
    words = "check a recipe: keys, types, combinations, templates, models"
    check = command(actions, "check", words, _recipe_check)
    add_recipe(check)


def _run(options: argparse.Namespace) -> int:
    from journeyman import steps, summary
    from journeyman.summary import written

    loaded = load(options)
    run = steps.Run(loaded)
    rollout.check(options, run)
    print(f"run       {run.where}", flush=True)
    done = steps.run(loaded, _print_result, new_labels=options.new)
    print()
    if loaded.student is None:
        print(summary.table(summary.costs(run)))
        print(f"\nlabel     {run.labels}")
        return 0
    writes = loaded.student.kind == "causal"
    data = written.written_data(run) if writes else summary.report_data(run)
    print(summary.table(data.summary))
    if writes:
        print(f"\ntrain     {run.path('train')}")
    print(f"{'' if writes else chr(10)}report    {done[-1].manifest['page']}")
    if options.from_feedback and writes:
        print("next      the same words behind `journeyman certify`, which certifies it")
    elif options.from_feedback:
        rollout.end(options, run)
    return 0


def _step(options: argparse.Namespace) -> int:
    from journeyman import steps

    run = steps.Run(load(options))
    with run.locked():
        result = run.execute(options.step, new_labels=getattr(options, "new", False))
    _print_result(result)
    if said := result.manifest.get("recommendation"):
        print(textwrap.indent(textwrap.fill(said, 88), " " * 10), flush=True)
    return 0


def _label(options: argparse.Namespace) -> int:
    from journeyman import steps

    if options.prepare:
        run = steps.Run(load(options))
        with run.locked():
            _print_result(run.execute("prepare"))
    if options.trial:
        if options.estimate or options.new:
            raise RecipeError("--try labels nothing: give it without --estimate and --new.")
        return trying.run(options)
    if options.take:
        raise RecipeError("--take goes with --try.")
    if not options.estimate:
        if options.rows:
            raise RecipeError("--rows is the size of the sample of --estimate and --try; to label "
                              "fewer rows set corpus.limits.")  # fmt: skip
        return _step(options)
    if options.new:
        raise RecipeError("--estimate labels a sample only and --new starts a dataset: give one.")
    run = steps.Run(load(options))
    with run.locked():
        print(run.estimate(options.rows or _ESTIMATE_ROWS).text())
    return 0


def _print_result(result: Any) -> None:
    if result.seconds is None:
        note = f"; {result.note}" if result.note else ""
        print(f"{result.name:<9} already done for the same inputs{note}", flush=True)
    else:
        print(f"{result.name:<9} done in {duration(result.seconds)}", flush=True)


def _recipe_schema(_: argparse.Namespace) -> int:
    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return 0


def _recipe_show(options: argparse.Namespace) -> int:
    import yaml

    print(yaml.safe_dump(load(options).model_dump(mode="json"), sort_keys=False), end="")
    return 0


def _recipe_check(options: argparse.Namespace) -> int:
    from journeyman import corpus, models, steps
    from journeyman.labels import quality
    from journeyman.student import step

    loaded = load(options)
    if loaded.student:
        steps.check(loaded)
    corpus.id_columns(loaded)
    quality.check(loaded.labels, has_gold=bool(loaded.corpus.columns.label))
    urls = corpus.source_urls(loaded.corpus)
    teacher = None
    if not loaded.teacher.gives_text_alone:
        teacher = models.resolve(loaded.teacher.model, loaded.teacher.revision)
    student = loaded.student and models.resolve(loaded.student.model, loaded.student.revision)
    if student:
        step.check_vocabulary(loaded, student, teacher or models.teacher(loaded.teacher))
    print(f"{options.recipe}: fine; {len(urls)} source files, recipe {loaded.hash}.")
    for role, model in (("teacher", teacher), ("student", student)):
        if model:
            print(f"{role:<9} {model.path} ({model.size_bytes / 1e6:,.0f} MB)")
    return 0
