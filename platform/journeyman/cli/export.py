"""``journeyman export``: a finished student in other formats."""

from __future__ import annotations

import argparse
from typing import Any

from journeyman.cli.arguments import add_recipe, command, load
from journeyman.cli.text import table
from journeyman.progress import LiveLine

_WORDS = """\
Write a run's finished student in other formats, each into exports/FORMAT of the run's folder, and
compare it with the student on held-out rows (the split calibrate).

  onnx   any batch and length; must answer as PyTorch does
  int8   ONNX with int8 weights, about a quarter of the size; what that costs is measured
  gguf   language models of the Llama architecture, for llama.cpp and its kin
"""

_EXAMPLES = """\
examples:
  journeyman export my.yaml --to onnx
  journeyman export my.yaml --to onnx --to int8
  journeyman export my.yaml --to gguf --precision q8_0
"""


def add_command(commands: Any) -> None:
    words = "write a finished student as ONNX, ONNX with int8 weights, or GGUF"
    export = command(commands, "export", words, _export, _WORDS, _EXAMPLES)
    add_recipe(export)
    export.add_argument(
        "--to",
        dest="formats",
        action="append",
        required=True,
        choices=("onnx", "int8", "gguf"),
        help="a format; may be given again",
    )
    export.add_argument(
        "--precision",
        choices=("f32", "f16", "q8_0"),
        default="f32",
        help="of a GGUF's matrices (default f32)",
    )


def _export(options: argparse.Namespace) -> int:
    from journeyman.run_folder import RunFolder
    from journeyman.student.formats import step

    run = RunFolder(load(options))
    with run.locked():
        run.fetch("train")
        for to in dict.fromkeys(options.formats):
            with LiveLine() as line:
                line.show(f"{to:<9} writing and checking")
                done = step.export(run, to, options.precision)
            run.mirror("export").below(to).push()
            print(f"{to:<9} {done.path}\n{done.difference()}\n")
            print(f"{table(done.table())}\n", flush=True)
    return 0
