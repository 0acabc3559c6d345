"""Arguments that several commands share: the recipe, and overrides of its settings."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from journeyman import recipe
from journeyman.recipe import Recipe

Do = Callable[[argparse.Namespace], int]


def command(
    commands: Any, name: str, words: str, do: Do, description: str = "", examples: str = ""
) -> argparse.ArgumentParser:
    """A command of its own: ``words`` in the list of commands, ``description`` in its help."""
    added: argparse.ArgumentParser = commands.add_parser(
        name,
        help=words,
        description=description or words[0].upper() + words[1:] + ".",
        epilog=examples or None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(do=do)
    return added


def add_recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="the recipe, a YAML file")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="override one setting, such as training.epochs=3; may be given again",
    )


def add_feedback(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument(
        "--from-feedback",
        metavar="FOLDER",
        help=f"what a running cascade kept (cascade.feedback.to): {words}, in a run of its own, "
        "NAME-feedback",
    )


def load(options: argparse.Namespace) -> Recipe:
    loaded = recipe.load(options.recipe, options.overrides)
    folder = getattr(options, "from_feedback", None)
    if folder is None:
        return loaded
    own = [f"corpus.feedback={json.dumps(folder)}", f"name={loaded.name}-feedback"]
    return recipe.load(options.recipe, options.overrides + own)


def positive(text: str) -> int:
    """An argument that is a whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return number
