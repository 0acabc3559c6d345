"""The ``journeyman`` command. Turns errors of ours into one sentence and exit status 1."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from journeyman import __version__, recipe
from journeyman.errors import JourneymanError
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
  journeyman recipe show jobs/recipes/demo.yaml      every setting, defaults filled in
  journeyman run jobs/recipes/demo.yaml              the whole pipeline
  journeyman run my.yaml --set training.epochs=8     with one setting changed
  journeyman label my.yaml --new                     label again from the start
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
    run = _command(commands, "run", "do every step of a recipe that is not done yet", _run)
    run.add_argument("--new", action="store_true", help=_NEW)
    for name, words in _STEPS.items():
        step = _command(commands, name, words, _step)
        step.set_defaults(step=name)
        if name == "label":
            step.add_argument("--new", action="store_true", help=_NEW)
    _recipe_commands(commands)
    return parser


_NEW = "start a new label dataset; the old one is kept as labels.old"


def _recipe_commands(commands: Any) -> None:
    about = commands.add_parser("recipe", help="look at a recipe: schema, show, check")
    actions = about.add_subparsers(required=True, metavar="ACTION")
    schema = actions.add_parser("schema", help="the JSON Schema of recipes, every key documented")
    schema.set_defaults(do=_recipe_schema)
    _command(actions, "show", "a recipe as it will run, defaults filled in", _recipe_show)
    _command(actions, "check", "check a recipe: keys, types, combinations, templates, models",
             _recipe_check)  # fmt: skip


def _command(commands: Any, name: str, words: str, do: Any) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=words, description=words[0].upper() + words[1:] + ".")
    command.add_argument("recipe", metavar="RECIPE", help="the recipe, a YAML file")
    command.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one setting, such as training.epochs=3; may be given again",
    )
    command.set_defaults(do=do)
    return command


def _load(options: argparse.Namespace) -> Recipe:
    return recipe.load(options.recipe, options.overrides)


def _run(options: argparse.Namespace) -> int:
    from journeyman import steps, summary

    loaded = _load(options)
    print(f"run       {loaded.run_dir}", flush=True)
    results = steps.run(loaded, _print_result, new_labels=options.new)
    print()
    print(summary.table(summary.report_data(steps.Run(loaded)).summary))
    print(f"\nreport    {results[-1].manifest['page']}")
    return 0


def _step(options: argparse.Namespace) -> int:
    from journeyman import steps

    run = steps.Run(_load(options))
    with run.locked():
        _print_result(run.execute(options.step, new_labels=getattr(options, "new", False)))
    return 0


def _print_result(result: Any) -> None:
    if result.seconds is None:
        print(f"{result.name:<9} already done for the same inputs", flush=True)
    else:
        print(f"{result.name:<9} done in {duration(result.seconds)}", flush=True)


def _recipe_schema(_: argparse.Namespace) -> int:
    print(json.dumps(Recipe.model_json_schema(), indent=2))
    return 0


def _recipe_show(options: argparse.Namespace) -> int:
    import yaml

    print(yaml.safe_dump(_load(options).model_dump(mode="json"), sort_keys=False), end="")
    return 0


def _recipe_check(options: argparse.Namespace) -> int:
    from journeyman import corpus, models, sources

    loaded = _load(options)
    corpus.id_columns(loaded)
    urls = sources.expand(loaded.corpus.sources)
    teacher = None
    if not loaded.teacher.url:
        teacher = models.resolve(loaded.teacher.model, loaded.teacher.revision)
    student = loaded.student and models.resolve(loaded.student.model, loaded.student.revision)
    print(f"{options.recipe}: fine; {len(urls)} source files, recipe {loaded.hash}.")
    for role, model in (("teacher", teacher), ("student", student)):
        if model:
            print(f"{role:<9} {model.path} ({model.size_bytes / 1e6:,.0f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
