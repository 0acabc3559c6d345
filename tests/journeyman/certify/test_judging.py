"""A judge of whether answers mean the same, and how far it can be believed: against counting and
SciPy; it is stood in for, but for the last test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from journeyman import corpus, models, recipe
from journeyman.cascade import watching
from journeyman.certify import bundle as bundles
from journeyman.certify import judging, written
from journeyman.certify.bundle import JudgeRecord, WrittenBundle
from journeyman.certify.judging import Verdicts
from journeyman.certify.row_answers import RowAnswers
from journeyman.errors import DataError, RecipeError
from journeyman.labels import dataset, pipeline
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.teacher.answers import ClassLabels

from ..labels import synthetic as made
from .test_written import LIKELIEST, STUDENT, TEACHER, of_teacher, said, settings

JUDGED = {"match": "judge", "judge": {"controls": 50}}
CITIES = [f"city {i}" for i in range(30)]

Verdict = Callable[[str, str], float]  # probability that the first means what the second does


def meaning(text: str) -> str:
    """What the stand-in for a judge reads in an answer: `it is city 3` is `City 3.`"""
    return text.casefold().replace("it is", "").strip(" .\n").replace("  ", " ")


def fair(first: str, second: str) -> float:
    return 0.9 if meaning(first) == meaning(second) else 0.1


def hash_of(first: str, second: str) -> int:
    return int(recipe.digest([first, second]), 16)


class Engines:
    """Stand in for the student's and the judge's."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.verdict: Verdict = fair
        self.dies = False

    def label(self, asked: Recipe, model: Model, rows: Path, labels: Path, _: Any) -> None:
        kind = asked.labels.kind
        if self.dies and kind == "classes":
            raise KeyboardInterrupt
        self.asked.append((model.reference, kind))
        say = self.answer if kind == "generate" else self.judge
        shards = [
            [(row, say(row)) for row in corpus.read_shard(rows, s["name"]).to_pylist()]
            for s in corpus.read_manifest(rows)["shards"]
        ]
        codec, beside = LIKELIEST if kind == "generate" else None, labels.parent / f"by-{kind}"
        made.write_dataset(beside, asked.labels, shards, codec=codec)
        (beside / "labels").rename(labels)

    def answer(self, row: dict[str, Any]) -> Any:
        """A third word for word, a third in other words, a third something else."""
        city, fate = city_of(row["id"]), int(row["id"][4:8], 16) % 3
        text = (city, f"It is {city}", "city 99")[fate]
        return said(text, [-0.1 if fate < 2 else -2.0])

    def judge(self, row: dict[str, Any]) -> ClassLabels | made.Quarantined:
        meta = json.loads(row["meta"])
        assert meta["request"] == row["text"]
        if self.verdict is None:
            return made.quarantined(row, "ContextOverflow", "too long")
        p = self.verdict(meta["first"], meta["second"])
        return made.classes(p, 1 - p)


def city_of(row_id: str) -> str:
    return CITIES[int(row_id[:4], 16) % len(CITIES)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    sources = [made.row(f"{split} {i}", split)
               for split, n in (("calibrate", 120), ("certify", 60), ("test", 20))
               for i in range(n)]  # fmt: skip
    taught = [(row, of_teacher(city_of(row["id"]))) for row in sources]
    made.write_dataset(tmp_path / "t", settings().labels, [taught], codec=made.TOP3)
    engines = Engines()
    monkeypatch.setattr(pipeline, "label", engines.label)

    def certify(**changes: Any) -> WrittenBundle:
        return written.certify(
            settings(**JUDGED | changes), tmp_path / "t" / "labels", tmp_path / "t" / "corpus",
            STUDENT, TEACHER, tmp_path / "answers", tmp_path / "bundle", inputs="i",
            on_progress=print,
        )  # fmt: skip

    certify.engines = engines  # type: ignore[attr-defined]
    return certify


def test_answers_in_other_words_agree_and_the_promise_says_whose_word_that_is(run, tmp_path: Path):
    bundle, engines = run(), run.engines
    assert engines.asked == [("student", "generate"), ("teacher", "classes")]
    rows = written.read(settings(), tmp_path / "t" / "labels", tmp_path / "answers" / "labels",
                        "certify")  # fmt: skip
    fates = np.array([int(i[4:8], 16) % 3 for i in rows.ids])
    assert rows.outcomes.differs.tolist() == (fates > 0).tolist()  # by their text
    assert bundle.match == "judge" and bundle.served.n_accepted == (fates < 2).sum()
    assert bundle.curve[-1].system_disagreement == pytest.approx((fates == 2).mean())
    assert bundle.judge is not None and bundle.judge.model == "teacher"
    assert "what a judge says" in bundle.recommendation
    assert "the promise is about its verdicts" in bundle.recommendation
    assert "Audits ask the teacher in the same way." in bundle.recommendation
    watch = watching.watch_of(bundle)
    assert watch is not None and watch.alpha == bundle.served.alpha
    assert watch.thresholds[0] == bundle.accept_above
    assert "took 0 of 50 pairs of answers to different requests" in bundle.recommendation
    assert bundles.load_any(tmp_path / "bundle") == bundle


def test_only_pairs_that_differ_by_their_text_are_asked_about_each_in_both_orders(run, tmp_path):
    bundle = run()
    pairs = tmp_path / "answers" / "judge" / "pairs"
    shards = [corpus.read_shard(pairs, s["name"]) for s in corpus.read_manifest(pairs)["shards"]]
    asked = [json.loads(row["meta"]) | row for shard in shards for row in shard.to_pylist()]
    assert all(row["first"].strip() != row["second"].strip() for row in asked)
    orders = {(row["text"], row["first"], row["second"]) for row in asked}
    assert orders == {(text, second, first) for text, first, second in orders}
    answers = dataset.read(tmp_path / "answers" / "labels")["id"].to_pylist()
    assert bundle.judge is not None
    assert bundle.judge.n_pairs == sum(int(i[4:8], 16) % 3 > 0 for i in answers)


def test_a_judge_that_favours_a_place_is_asked_in_both_and_must_say_so_in_both(run):
    """It calls anything the same whose first answer is the longer one."""
    run.engines.verdict = lambda a, b: max(fair(a, b), 0.9 * (len(a) > len(b)))
    bundle = run()
    assert bundle.judge is not None and bundle.judge.false_agreement.count == 0


def test_its_errors_are_counted_on_pairs_that_are_known_with_exact_intervals(run):
    """It calls `city 7`, and no other, the same as anything; and is blind to full stops."""

    def verdict(a: str, b: str) -> float:
        a, b = meaning(a), meaning(b)
        return 0.9 if a == b != "city 3" or "city 7" in (a, b) else 0.1

    run.engines.verdict = verdict
    record = run().judge
    for rate in (record.false_agreement, record.false_difference):
        interval = binomtest(rate.count, rate.n).proportion_ci(0.95, method="exact")
        assert (rate.low, rate.high) == pytest.approx((interval.low, interval.high))
        assert rate.n == 50 and 0 < rate.count < 25


def test_controls_are_of_different_requests_or_of_one_answer_in_another_form():
    def row(name: str, student: str | None, teacher: str) -> RowAnswers:
        return RowAnswers(id=name, gold=None, student=student, logprobs=np.empty(0),
                          teacher_logprob=None,
                          teacher=teacher, samples=(), agreement=None)  # fmt: skip

    rows = [row("a", "Rome", "Rome."), row("b", "Rome", "Paris"), row("c", None, "Oslo"),
            row("d", "Bonn", "Oslo")]  # fmt: skip
    known = judging.controls(rows, lambda a, b: a.strip(".") == b.strip("."), 9, "calibrate")
    differing = [(p.row, p.one, p.other) for p in known if p.known == "different"]
    # a: `Rome` to b is also what it says to a; b: `Bonn` to d; d: `Rome` to a.
    assert differing == [("b", "Bonn", "Paris"), ("d", "Rome", "Oslo")]
    alike = {p.other: p.one for p in known if p.known == "same"}
    assert alike == {"Rome.": "\nRome\n", "Paris": "\nParis.\n", "Oslo": "\nOslo.\n"}


@pytest.mark.parametrize(
    "verdict",
    [lambda *_: 0.9, lambda *_: 0.1, lambda a, b: 0.4 + 0.2 * (hash_of(a, b) % 2)],
    ids=["always", "never", "coin"],
)
def test_a_judge_whose_verdicts_tell_nothing_certifies_nothing_and_spends_nothing(
    verdict: Verdict, run, tmp_path: Path
):
    run.engines.verdict = verdict
    with pytest.raises(DataError, match="which tells nothing: name a stronger model"):
        run()
    assert not (tmp_path / "bundle").exists()
    run.engines.verdict = None
    with pytest.raises(DataError, match="tells nothing"):
        run(judge={"controls": 40})  # no verdict at all: nothing is the same


def test_a_run_killed_while_it_judges_goes_on_and_other_pairs_are_judged_anew(run, tmp_path: Path):
    run.engines.dies = True
    with pytest.raises(KeyboardInterrupt):
        run()
    pairs = tmp_path / "answers" / "judge" / "pairs" / "manifest.json"
    before = pairs.stat().st_mtime_ns
    run.engines.dies = False
    run()
    run(alpha=0.4)
    assert pairs.stat().st_mtime_ns == before
    assert run.engines.asked == [("student", "generate"), ("teacher", "classes")]
    run(judge={"same": "yes", "different": "no"}, max_delta=0.9)
    assert run.engines.asked[2:] == [("teacher", "classes")]


def test_the_teachers_samples_are_judged_as_its_students_answers_are(tmp_path: Path):
    asked = settings("rationales", {"prompt": "{{ text }}?"}, **JUDGED)
    source = made.row("capital?", "certify")
    taught = [(source, made.rationales(["Rome", "Rome", "it is Rome", "Paris", None]))]
    made.write_dataset(tmp_path / "t", asked.labels, [taught])
    answers = made.write_dataset(tmp_path / "s", written.check(asked),
                                 [[(source, said("Roma", [-1.0]))]], codec=LIKELIEST)  # fmt: skip
    parts = asked, tmp_path / "t" / "labels", Path(answers.where), "certify"
    rows = {"certify": written.row_answers(asked.labels, *parts[1:])}
    pairs = judging.pairs_of_answers(rows, written.comparison(asked), "certify")
    assert {(p.one, p.other) for p in pairs} == {
        ("Roma", "Rome"), ("it is Rome", "Rome"), ("Paris", "Rome"),
    }  # fmt: skip
    p_same = {judging._id(p.row, *order): fair(p.one, p.other)
              for p in pairs for order in ((p.one, p.other), (p.other, p.one))}  # fmt: skip
    judged = written.read(*parts, verdicts=Verdicts(p_same))
    assert judged.self_agreement == pytest.approx(3 / 5)
    assert written.read(*parts).self_agreement == pytest.approx(2 / 5)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"match": "judge", "judge": {"prompt": "{{ first }}?"}}, "must name .*second"),
        ({"match": "judge", "judge": {"same": "No"}}, "two different words"),
        ({"judge": {"same": "Aye"}}, "judge goes with match: judge"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused(values: dict[str, Any], match: str):
    with pytest.raises(RecipeError, match=match):
        settings(**values)


def test_what_a_judge_cannot_do_is_said():
    spoken = settings(**JUDGED)
    teacher = spoken.teacher.model_copy(update={"column": "said"})
    with pytest.raises(RecipeError, match=r"certify\.judge\.teacher: \{model"):
        written.check(spoken.model_copy(update={"teacher": teacher}))
    assert "judge" not in settings(alpha=0.3).certify.decisive()


def test_another_judge_has_settings_and_a_template_of_its_own():
    own = {
        "teacher": {"model": "m", "url": "http://judge/v1"},
        "prompt": "{{ first }} {{ second }}",
    }
    asked = judging.asked_of_judge(settings(match="judge", judge=own), settings().labels)
    assert (asked.scoring, asked.prompt, asked.prior_correction) == (
        "direct", "{{ first }} {{ second }}", "none",
    )  # fmt: skip
    other = settings(match="judge", judge=own)
    assert judging.teacher_of(other).model == "m" and not judging.teacher_judges(other)
    alike = settings(match="judge", judge={"teacher": other.teacher.model_dump(exclude_unset=True)})
    assert judging.teacher_judges(alike) and judging.teacher_judges(settings(match="judge"))


def test_a_promise_by_another_judge_says_that_nothing_watches_over_it(run):
    rate = run().judge.false_agreement
    record = JudgeRecord(model="m", model_digest="m", prompt_digest="p", n_pairs=3,
                         false_agreement=rate, false_difference=rate)  # fmt: skip
    other = settings(match="judge", judge={"teacher": {"model": "other"}})
    assert "do not watch over this one" in judging.words(record, other)
    assert "do not watch" not in judging.words(record, settings(match="judge"))
    assert judging.words(None, settings()) == ""


# --- with real engines ---


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_verdicts_are_the_models_own_probabilities_of_its_two_words(
    ray_cluster: None, tmp_path: Path
):
    """Of a judge with random weights, which tells nothing: against transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.serve import tiny

    tiny.write_teacher(tmp_path / "student")
    tiny.write_teacher(tmp_path / "teacher", seed=1)
    student, judge = (models.resolve(str(tmp_path / name)) for name in ("student", "teacher"))
    prompt = "{{ request }} A: {{ first }} B: {{ second }} The same?\n"
    values = tiny.a_recipe(tmp_path).model_dump(mode="json", exclude_unset=True) | {
        "labels": {"kind": "generate", "prompt": "Say more: {{ text }}", "max_tokens": 3},
        "student": {"model": str(tmp_path / "student"), "kind": "causal"},
        "certify": {"match": "judge", "judge": {"prompt": prompt, "controls": 4}},
    }
    asked = recipe.parse(values)
    texts = {"calibrate": tiny.TEXTS[8:14], "certify": tiny.TEXTS[:8]}
    rows = [made.row(text, split) for split, some in texts.items() for text in some]
    taught = [(row, of_teacher(" ".join(row["text"].split()[:2]))) for row in rows]
    made.write_dataset(tmp_path / "t", asked.labels, [taught], codec=made.TOP3)
    with pytest.raises(DataError, match=r"which tells nothing"):
        written.certify(
            asked, tmp_path / "t" / "labels", tmp_path / "t" / "corpus", student, judge,
            tmp_path / "answers", tmp_path / "bundle", inputs="i", on_progress=lambda _: None,
        )  # fmt: skip
    told = Verdicts.read(tmp_path / "answers" / "judge" / "labels").p_same
    pairs = tmp_path / "answers" / "judge" / "pairs"
    shards = [corpus.read_shard(pairs, s["name"]) for s in corpus.read_manifest(pairs)["shards"]]
    questions = [row for shard in shards for row in shard.to_pylist()]
    assert len(told) == len(questions) == 2 * (len(rows) + 8)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "teacher")

    def logprob(question: list[int], word: str) -> float:
        ids = tokenizer.encode(word, add_special_tokens=False)
        with torch.inference_mode():
            logits = model(torch.tensor([question + ids])).logits[0, len(question) - 1 : -1]
        return float(logits.double().log_softmax(-1)[range(len(ids)), ids].sum())

    for row in questions[:6]:
        meta = json.loads(row["meta"])
        text = f"Say more: {row['text']} A: {meta['first']} B: {meta['second']} The same?\n"
        question = tokenizer.encode(text)
        yes, no = logprob(question, "Yes"), logprob(question, "No")
        assert told[row["id"]] == pytest.approx(1 / (1 + np.exp(no - yes)), abs=1e-3)
