"""What a finished run of a student that writes shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from journeyman import corpus, files, models
from journeyman.certify import bundle as bundles
from journeyman.certify import written
from journeyman.certify.bundle import WrittenBundle
from journeyman.certify.row_answers import row_answers
from journeyman.certify.written_answers import OF_STUDENT, OF_TEACHER, PROMPTS
from journeyman.labels import cost, dataset
from journeyman.labels.store import LabelStore
from journeyman.report.data import SummaryRow
from journeyman.report.verdict import percent, share
from journeyman.report.written import WrittenData, WrittenTest
from journeyman.run_folder import RunFolder
from journeyman.student.checkpoints import Evaluation
from journeyman.student.learner import AGREES_WITH, LOSS
from journeyman.summary import costs, page_facts, sizes


def written_data(run: RunFolder) -> WrittenData:
    """Everything on the page of a student that writes, read from the run's folders."""
    bundle, test = _bundle(run), None
    if bundle is not None and _has_test(run):
        test = _test(run, bundle)
    best = _best(run)
    return WrittenData(
        **page_facts(run),
        summary=[
            *_learned(best, run),
            *_promise(bundle, test),
            *(_speed(run) if bundle is not None else []),
            *sizes(run),
            *costs(run),
        ],
        learned=f"The student's first choice is {AGREES_WITH[best.against]} at "
        f"{best.agreement:.1%} of the tokens of {best.n_rows:,} calibrate rows; "
        f"{LOSS[best.against]} is {best.loss:.3f} nats a token.",
        bundle=bundle,
        test=test,
    )


def _best(run: RunFolder) -> Evaluation:
    return Evaluation(**files.read_json(run.path("train") / "journeyman.json")["best"])


def _learned(best: Evaluation, run: RunFolder) -> list[SummaryRow]:
    agrees = f"with {AGREES_WITH[best.against]}, token by token"
    rows = [
        ("agreement", f"{best.agreement:.3f}", agrees),
        (LOSS[best.against], f"{best.loss:.3f} nats", "a token"),
        ("perplexity", f"{best.perplexity:,.1f}", "of the text's own tokens"),
    ]
    if run.recipe.labels.kind != "logits":
        exact = f"{best.exact_match:.3f}"
        rows.append(("exact", exact, "answers that it writes to the letter, greedily"))
    group = f"student, {best.n_rows:,} calibrate rows"
    return [SummaryRow(group=group, name=n, value=v, note=note) for n, v, note in rows]


def _promise(bundle: WrittenBundle | None, test: WrittenTest | None) -> list[SummaryRow]:
    if bundle is None:
        return []
    served, confidence = bundle.served, percent(1 - bundle.served.delta)
    kind = served.kind.replace("_", " ")
    rows = [("promised", f"at most {percent(served.alpha)}", f"{kind}, confidence {confidence}")]
    if test is not None:
        seen = test.measured
        rows.append(("answered by the student", share(seen.n_accepted, seen.n), "test rows"))
        rows.append(
            ("of those, otherwise than the teacher",
             share(seen.n_accepted_differs, seen.n_accepted), "")
        )  # fmt: skip
    if not served.feasible:
        rows.append(("escalates everything", "yes", served.reason))
    return [SummaryRow(group="the promise", name=n, value=v, note=note) for n, v, note in rows]


def writing_rates(run_dir: Path) -> dict[str, float]:
    """Rows a second of a replica of each that wrote on the held-out rows for the certificate:
    ``student``, and ``teacher`` where its labels are no answers."""
    wrote = {"student": OF_STUDENT, "teacher": OF_TEACHER}
    found = {who: dataset.totals(run_dir / "answers" / name) for who, name in wrote.items()}
    took = {who: cost.seconds_a_row(totals) for who, totals in found.items() if totals}
    return {who: 1 / seconds for who, seconds in took.items() if seconds}


def times_the_teacher(rates: Mapping[str, float]) -> float | None:
    """None where only one of them wrote."""
    return rates["student"] / rates["teacher"] if len(rates) == 2 else None


def _speed(run: RunFolder) -> list[SummaryRow]:
    rates = writing_rates(run.directory)
    ratio = times_the_teacher(rates)
    notes = {"student": f"{ratio:.1f} times the teacher" if ratio else "",
             "teacher": "both on the held-out rows, batched"}  # fmt: skip
    return [
        SummaryRow(group="speed", name=who, value=f"{rate:,.1f} rows/s", note=notes[who])
        for who, rate in rates.items()
    ]


def _bundle(run: RunFolder) -> WrittenBundle | None:
    """None where there is none of this student, and of this recipe."""
    folder = run.path("certify")
    if not (folder / bundles.BUNDLE_FILE).is_file():
        return None
    labels = dataset.finished_manifest(LabelStore(run.labels))
    student = models.resolve(str(run.path("train")))
    inputs = written.inputs_digest(run.recipe, labels, student)
    if files.read_json(folder / "manifest.json").get("inputs") != inputs:
        return None
    bundle = bundles.load_any(folder)
    assert isinstance(bundle, WrittenBundle)  # by its inputs
    return bundle


def _has_test(run: RunFolder) -> bool:
    """Some test rows are there, and not all of them in quarantine."""
    return bool(files.read_json(run.path("certify") / "manifest.json").get("test"))


def _test(run: RunFolder, bundle: WrittenBundle) -> WrittenTest:
    folder = run.directory / "answers"
    rows = written.read_certified(run.recipe, run.labels, folder, "test")
    said = row_answers(
        written.question(run.recipe),
        written.of_teacher(run.recipe, run.labels, folder),
        folder / OF_STUDENT,
        "test",
    )
    asked, confidence = corpus.by_id(folder / PROMPTS), rows.scores(bundle.confidence)
    return WrittenTest(
        ids=rows.ids,
        texts=[asked[row.id][0] for row in said],
        metas=[asked[row.id][1] for row in said],
        teacher_logprobs=[row.teacher_logprob for row in said],
        student_logprobs=[
            None if row.student is None else float(row.logprobs.sum(dtype=np.float64))
            for row in said
        ],
        gold=[row.gold for row in said],
        teacher=[row.teacher for row in said],
        student=[row.student for row in said],
        differs=rows.outcomes.differs,
        right=rows.right,
        confidence=confidence,
        accepted=np.asarray(confidence > bundle.accept_above),
    )
