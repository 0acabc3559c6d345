"""``journeyman export``: a run's finished student written, checked and weighed in another format.

RUN/exports/FORMAT/   the model's file, config and tokenizer, README.md (the student's card and
                      what this copy costs), export.json (the same in figures)
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import journeyman
from journeyman import files
from journeyman.errors import DataError, ModelError
from journeyman.labels import dataset
from journeyman.labels.store import LabelStore
from journeyman.run_folder import RunFolder
from journeyman.student import causal, models, step
from journeyman.student.formats import gguf, onnx
from journeyman.student.formats.held_out import (
    Answer,
    Compared,
    HeldOut,
    HeldOutClasses,
    HeldOutTokens,
    compare,
    of_torch,
)
from journeyman.student.inputs import Inputs
from journeyman.student.learner import Measured, no_rows

Format = Literal["onnx", "int8", "gguf"]
FORMATS: tuple[Format, ...] = ("onnx", "int8", "gguf")
MANIFEST = "export.json"
SPLIT = "calibrate"
# Of a log-probability: what float32 sums in another order differ by is ten times less.
TOLERANCE = 1e-3
_PYTORCH, _ONNX = "PyTorch, float32", f"{onnx.FILE}*"
_FIGURES = {
    "KL": "kl",
    "cross-entropy": "cross_entropy",
    "accuracy": "gold_accuracy",
    "perplexity": "perplexity",
}
_KEPT = ("config.json", "generation_config.json", "tokenizer*", "*.jinja", "vocab.txt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two that were compared."""

    name: str
    n_bytes: int  # of its weights
    rows_per_s: float
    measured: Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A copy of the student, and how it compares with one in float32."""

    path: Path  # its folder
    format: Format
    precision: str
    size_bytes: int
    baseline: str  # what it was compared with
    baseline_bytes: int
    compared: Compared

    @property
    def name(self) -> str:
        """Such as ``onnx, f32`` or ``int8``."""
        return ", ".join(dict.fromkeys((self.format, self.precision)))

    @property
    def sides(self) -> tuple[Side, Side]:
        """The baseline, and the copy."""
        found = self.compared
        return (
            Side(
                name=self.baseline,
                n_bytes=self.baseline_bytes,
                rows_per_s=found.student_rows_per_s,
                measured=found.student,
            ),
            Side(
                name=self.name,
                n_bytes=self.size_bytes,
                rows_per_s=found.copy_rows_per_s,
                measured=found.copy,
            ),
        )

    def difference(self) -> str:
        """How far the two are apart, in a sentence."""
        found = self.compared
        return (
            f"On {found.n_rows} held-out rows (the split `{SPLIT}`) its log-probabilities differ "
            f"by at most {found.largest_difference:.2g} from those of {self.baseline}."
        )

    def table(self) -> list[list[str]]:
        """Heads, and a row for each side."""
        heads = ["", "MB", "rows/s", "agreement"]
        cells = [
            [
                side.name,
                f"{side.n_bytes / 1e6:,.1f}",
                f"{side.rows_per_s:,.1f}",
                f"{side.measured.agreement:.4f}",
            ]
            for side in self.sides
        ]
        for name, key in _FIGURES.items():
            values = [getattr(side.measured, key) for side in self.sides]
            if None not in values:
                heads.append(name)
                for row, value in zip(cells, values, strict=True):
                    row.append(f"{value:.4f}")
        return [heads, *cells]


def export(run: RunFolder, to: Format, precision: gguf.Precision = "f32") -> Exported:
    """Write RUN/exports/FORMAT, whole or not at all, and compare it with the student on held-out
    rows (at most ``held_out.MOST_ROWS`` of the split ``calibrate``).

    precision: of a GGUF's matrices. Raises ModelError where a package is missing, the student does
    not fit the format or the copy answers otherwise; DataError where the run has no student yet.
    """
    versions = gguf.check_packages() if to == "gguf" else onnx.check_packages()
    record = _student_record(run)
    model = _model(run)
    if to == "gguf":
        gguf.check_architecture(model.config)
        if run.recipe.learner().kind == "classifier":
            raise ModelError(
                "GGUF is written of language models, and this student is a classifier; export it "
                "to onnx or int8."
            )
    final = run.path("export") / to
    with _held_out(run) as rows, files.replaced_directory(final) as fresh:
        for pattern in _KEPT:
            for file in run.path("train").glob(pattern):
                shutil.copyfile(file, fresh / file.name)
        done = _written(run, model, rows, fresh, to, precision)
        done = dataclasses.replace(done, path=final)
        files.write_json(fresh / MANIFEST, _manifest(done, record, versions))
        card = (run.path("train") / "README.md").read_text(encoding="utf-8")
        files.write_bytes(fresh / "README.md", f"{card}\n{_card(done)}".encode())
    return done


def _written(
    run: RunFolder, model: Any, rows: HeldOut, folder: Path, to: Format, precision: gguf.Precision
) -> Exported:
    student = of_torch(model)
    done = partial(Exported, path=folder, format=to)
    student_bytes = _bytes(run.path("train"), "*.safetensors")
    if to == "gguf":
        gguf.write(model, run.path("train"), folder, run.recipe.name, precision)
        found = compare(rows, student, of_torch(gguf.read(folder / gguf.FILE)))
        if precision == "f32":
            _check(found, gguf.FILE)
        return done(
            precision=precision,
            size_bytes=_bytes(folder, gguf.FILE),
            baseline=_PYTORCH,
            baseline_bytes=student_bytes,
            compared=found,
        )
    if to == "onnx":
        found = _checked_onnx(model, student, rows, folder)
        return done(
            precision="f32",
            size_bytes=_bytes(folder, _ONNX),
            baseline=_PYTORCH,
            baseline_bytes=student_bytes,
            compared=found,
        )
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        float32 = Path(scratch)
        _checked_onnx(model, student, rows, float32)
        onnx.quantise(float32 / onnx.FILE, folder)
        copies = (onnx.answers(part / onnx.FILE) for part in (float32, folder))
        return done(
            precision="int8",
            size_bytes=_bytes(folder, _ONNX),
            baseline="ONNX, float32",
            baseline_bytes=_bytes(float32, _ONNX),
            compared=compare(rows, *copies),
        )


def _checked_onnx(model: Any, student: Answer, rows: HeldOut, folder: Path) -> Compared:
    onnx.write(model, folder)
    found = compare(rows, student, onnx.answers(folder / onnx.FILE))
    _check(found, onnx.FILE)
    return found


def _check(found: Compared, file: str) -> None:
    """Raises ModelError where a copy with the student's own weights answers otherwise."""
    if found.largest_difference > TOLERANCE:
        raise ModelError(
            f"{file}: log-probabilities on {found.n_rows} {SPLIT} rows differ by up to "
            f"{found.largest_difference:.2g} from PyTorch's, where {TOLERANCE:g} is allowed; the "
            "file is not kept. Export to another format."
        )


def _student_record(run: RunFolder) -> dict[str, Any]:
    """The student's own; raises DataError where there is none, or of other labels."""
    record: dict[str, Any] = files.read_json(run.path("train") / "journeyman.json")
    if dataset.finished_manifest(LabelStore(run.labels))["digest"] != record["labels"]:
        raise DataError(
            f"{run.path('train')}: the student learned from other labels than {run.labels} holds "
            "now; run journeyman train again."
        )
    return record


def _model(run: RunFolder) -> Any:
    if run.recipe.learner().kind == "causal":
        return causal.load(run.path("train"))
    return models.Classifier.load(run.path("train")).model


@contextmanager
def _held_out(run: RunFolder) -> Iterator[HeldOut]:
    student, corpus_dir = run.path("train"), run.corpus
    if run.recipe.learner().kind == "classifier":
        rows = dataset.read_classes(run.labels, corpus_dir, (SPLIT,))
        if not len(rows):
            raise no_rows(SPLIT)
        yield HeldOutClasses(rows, Inputs(run.recipe.learner()), student)
        return
    with files.scratch_folder(run.directory / "held-out") as scratch:
        step.write_rows(
            run.recipe, run.labels, corpus_dir, run.base_student, run.teacher, scratch, (SPLIT,)
        )
        yield HeldOutTokens(scratch / SPLIT, student)


def _bytes(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def _manifest(
    done: Exported, record: dict[str, Any], versions: dict[str, str]
) -> dict[str, object]:
    found = done.compared
    return {
        "schema_version": 1,
        "kind": "export",
        "journeyman": journeyman.__version__,
        "versions": versions,
        "student": record["inputs"],
        "format": done.format,
        "precision": done.precision,
        "split": SPLIT,
        "rows": found.n_rows,
        "largest_logprob_difference": found.largest_difference,
        "tolerance": TOLERANCE if done.precision == "f32" else None,
        "sides": [
            {"what": side.name, "bytes": side.n_bytes, "rows_per_s": round(side.rows_per_s, 3)}
            | dataclasses.asdict(side.measured)
            for side in done.sides
        ],
    }


def _card(done: Exported) -> str:
    """What is added to the student's own card."""
    heads, *rows = done.table()
    lines = [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
    return f"""## This copy: {done.name}

Written by Journeyman {journeyman.__version__}. {done.difference()}

{chr(10).join(lines)}
"""
