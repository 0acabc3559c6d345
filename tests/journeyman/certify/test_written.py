"""Certifying a student that writes: what it said beside what the teacher said, against counting and
SciPy; its engine is stood in for, but for the last test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from journeyman import corpus, models, recipe, steps
from journeyman.certify import bundle as bundles
from journeyman.certify import written, written_answers
from journeyman.certify.bundle import WrittenBundle
from journeyman.certify.deferral_head import fit_deferral_head
from journeyman.certify.sequence_scores import WrittenConfidence, token_features
from journeyman.errors import BundleMismatch, DataError, RecipeError
from journeyman.labels import dataset, pipeline
from journeyman.labels.codec import Codec
from journeyman.labels.store import LabelStore
from journeyman.models import Model
from journeyman.recipe import Recipe
from journeyman.teacher.answers import GeneratedLabels, Recorded

from ..labels import synthetic as made

LIKELIEST = Codec(name="topk_fp16", vocab_size=made.VOCABULARY, k=1)
STUDENT = Model(
    reference="student", path=Path("student"), weights_digest="s" * 64, tokenizer_digest="t" * 64,
    size_bytes=1,
)  # fmt: skip
TEACHER = dataclasses.replace(STUDENT, reference="teacher", weights_digest="w" * 64)


def settings(
    kind: str = "generate", labels: dict[str, Any] | None = None, **certify: Any
) -> Recipe:
    values = made.recipe_of(kind, **(labels or {})).model_dump(mode="json")
    student = {"model": "student", "kind": "causal"}
    return recipe.parse(values | {"student": student, "certify": {"alpha": 0.2} | certify})


def said(text: str, logprobs: list[float]) -> GeneratedLabels:
    """A student's answer, with the log-probability of each token."""
    ids = np.arange(len(logprobs), dtype=np.int32)
    recorded = Recorded(
        token_ids=ids[:, None], logprobs=np.array(logprobs, dtype=np.float32).reshape(-1, 1)
    )
    return GeneratedLabels(
        output=text, token_ids=ids, output_logprob=float(sum(logprobs)), recorded=recorded,
        n_prompt_tokens=4, n_output_tokens=len(ids), finish_reason="stop",
    )  # fmt: skip


def of_teacher(text: str) -> GeneratedLabels:
    return made.generated(text, [1], made.distributions(1))


# --- scores ---

some_answers = st.lists(
    st.lists(st.floats(-30, 0), min_size=1, max_size=12), min_size=1, max_size=8
)


@given(some_answers)
def test_scores_are_those_of_each_answer(answers):
    flat, lengths = np.concatenate(answers), [len(a) for a in answers]
    for name, expected in (
        ("mean_logprob", [np.mean(a) for a in answers]),
        ("least_logprob", [np.min(a) for a in answers]),
        ("token_quantile", [np.quantile(a, 0.1) for a in answers]),
    ):
        confidence = WrittenConfidence(score=name)
        together = confidence.of(flat, lengths)
        np.testing.assert_allclose(together, expected, atol=1e-12)
        alone = np.concatenate([confidence.of(a, [len(a)]) for a in answers])
        assert together.tobytes() == alone.tobytes()


def test_a_learned_score_is_the_heads_of_the_quantiles():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 40)
    logprobs = np.float16(-rng.exponential(size=lengths.sum()))
    features = token_features(logprobs, lengths)
    head = fit_deferral_head(features, features[:, 0] < -1)
    got = WrittenConfidence(score="deferral_head", head=head).of(logprobs, lengths)
    np.testing.assert_array_equal(got, head.may_answer(features))
    with pytest.raises(RecipeError, match="needs a fitted head"):
        WrittenConfidence(score="deferral_head").of(logprobs, lengths)


# --- what the same answer is ---


def read(
    tmp_path: Path,
    asked: Recipe,
    rows: list[tuple[Any, GeneratedLabels | None, str | None]],
    split: str = "certify",
) -> written.WrittenRows:
    """rows: what the teacher said, what the student did, and gold."""
    sources = [made.row(f"row {i}", split, gold) for i, (_, _, gold) in enumerate(rows)]
    taught = list(zip(sources, (t for t, _, _ in rows), strict=True))
    codec = made.TOP3 if asked.labels.kind == "generate" else None
    made.write_dataset(tmp_path / "t", asked.labels, [taught], codec=codec)
    own = [(s, r[1] or made.quarantined(s, "ContextOverflow", "too long"))
           for s, r in zip(sources, rows, strict=True)]  # fmt: skip
    answers = made.write_dataset(
        tmp_path / "s", written.check(asked), [own], codec=LIKELIEST
    ).directory
    assert answers is not None
    return written.read(asked, tmp_path / "t" / "labels", answers, split)


def test_rows_are_what_both_said_and_a_row_without_an_answer_is_never_trusted(tmp_path: Path):
    got = read(tmp_path, settings(), [
        (of_teacher("Paris"), said(" Paris\n", [-0.5, -0.25]), "Paris"),
        (of_teacher("Paris"), said("paris", [-1.0]), "paris"),
        (of_teacher("Rome"), None, "Rome"),
        (of_teacher(""), said("", []), ""),
    ])  # fmt: skip
    assert got.outcomes.differs.tolist() == [False, True, True, True]
    assert got.outcomes.losses.tolist() == [0, -1, 1, 1]
    assert got.outcomes.has_gold.all() and got.right is not None
    assert got.lengths.tolist() == [2, 1, 0, 0]
    np.testing.assert_allclose(got.logprobs, [-0.5, -0.25, -1.0], atol=2e-3)  # the codec's bound
    scores = got.scores(WrittenConfidence(score="mean_logprob"))
    np.testing.assert_allclose(scores[:2], [-0.375, -1.0], atol=2e-3)
    assert scores[2:].tolist() == [written.NEVER, written.NEVER]
    assert got.self_agreement is None


def test_what_a_pattern_finds_is_compared_and_an_answer_without_it_is_like_no_other(tmp_path: Path):
    asked = settings(match="parsed", answer_pattern=r"(?P<answer>\d+)")
    got = read(tmp_path, asked, [
        (of_teacher("so it is 12"), said("2 and 10 is 12.", [-1.0]), "12"),
        (of_teacher("it is 12"), said("twelve", [-1.0]), "the 12th"),
        (of_teacher("no idea"), said("no idea", [-1.0]), None),
    ])  # fmt: skip
    assert got.outcomes.differs.tolist() == [False, True, True]
    assert got.outcomes.losses.tolist()[:2] == [0, 1]
    assert got.outcomes.has_gold.tolist() == [True, True, False] and got.right is None


def test_rationales_are_asked_for_their_answer_and_say_how_the_teacher_agrees_with_itself(
    tmp_path: Path,
):
    asked = settings("rationales", {"number": True, "prompt": "{{ text }}?"})
    got = read(tmp_path, asked, [
        (made.rationales(["1,000", "1,000", "7"]), said("1000", [-1.0]), "1000"),
        (made.rationales(["7", "7", "7"]), said("8", [-1.0]), "8"),
    ])  # fmt: skip
    assert written.check(asked).prompt == "[label] {{ text }}?"
    assert got.outcomes.differs.tolist() == [False, True]
    assert got.outcomes.losses.tolist() == [0, -1]
    assert got.self_agreement == pytest.approx((2 / 3 + 1) / 2)


# --- the bundle ---


class Engine:
    """Stands in for the student's: answers as it is told, and dies if it is told."""

    def __init__(self, answers: Callable[[dict[str, Any]], GeneratedLabels]) -> None:
        self.answers = answers
        self.asked: list[str] = []
        self.dies = False

    def label(self, asked: Recipe, model: Model, prompts: Path, labels: Path, _: Any) -> None:
        assert (asked.teacher.model, model) == ("student", STUDENT)
        self.asked.append(asked.labels.prompt)
        if self.dies:
            raise KeyboardInterrupt
        shards = [
            [(row, self.answers(row)) for row in corpus.read_shard(prompts, s["name"]).to_pylist()]
            for s in corpus.read_manifest(prompts)["shards"]
        ]
        made.write_dataset(labels.parent / "made", asked.labels, shards, codec=LIKELIEST)
        (labels.parent / "made" / "labels").rename(labels)


@pytest.fixture
def certify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., WrittenBundle]:
    """A student that agrees with its teacher as often as its tokens say: of 400 rows of each split,
    100 of test and 100 of train, which nobody is to ask for."""
    sources = [made.row(f"{split} {i}", split, "yes" if i % 3 else "no")
               for split, n in (("train", 100), ("calibrate", 400), ("certify", 400), ("test", 100))
               for i in range(n)]  # fmt: skip
    fates = [(row, of_teacher("yes")) for row in sources]
    made.write_dataset(tmp_path / "t", settings().labels, [fates[:450], fates[450:]],
                       codec=made.TOP3)  # fmt: skip

    def answer(row: dict[str, Any]) -> GeneratedLabels:
        assert row["split"] != "train"
        sure = int(row["id"][:4], 16) / 0xFFFF
        agrees = int(row["id"][4:8], 16) / 0xFFFF < 0.5 + sure / 2
        return said("yes" if agrees else "no", [-1 + sure, -0.01])

    engine = Engine(answer)
    monkeypatch.setattr(pipeline, "label", engine.label)

    def run(asked: Recipe | None = None, student: Model = STUDENT) -> WrittenBundle:
        run.engine = engine  # type: ignore[attr-defined]
        return written.certify(
            asked or settings(), tmp_path / "t" / "labels", tmp_path / "t" / "corpus", student,
            TEACHER, tmp_path / "answers", tmp_path / "bundle", inputs="i", on_progress=print,
        )  # fmt: skip

    return run


def test_the_promise_is_the_largest_count_that_the_binomial_allows(certify, tmp_path: Path):
    bundle = certify()
    served = bundle.served
    rows = written.read(
        settings(), tmp_path / "t" / "labels", tmp_path / "answers" / "labels", "certify"
    )
    scores = rows.scores(bundle.confidence)
    accepted = scores > bundle.accept_above
    errors = int((accepted & rows.outcomes.differs).sum())
    assert (served.n, served.n_accepted, served.errors) == (400, accepted.sum(), errors)
    assert 0.3 < accepted.mean() < 1
    assert binom.cdf(errors, 400, 0.2) <= 0.1  # so many or fewer, were the promise broken
    more = np.sort(scores[~accepted])[-1]  # the next threshold lets through too many
    let = scores >= more
    assert binom.cdf((let & rows.outcomes.differs).sum(), 400, 0.2) > 0.1
    assert bundle.student_accuracy is not None and bundle.teacher_accuracy == pytest.approx(
        2 / 3, abs=0.01
    )
    assert bundle.longest == len("calibrate 399")
    assert bundles.load_any(tmp_path / "bundle") == bundle
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["recommendation"] == bundle.recommendation


def test_what_came_of_the_promise_is_counted_on_test_rows(certify, tmp_path: Path):
    bundle = certify()
    parts = tmp_path / "t" / "labels", tmp_path / "answers" / "labels"
    ids = written.read(settings(), *parts, "test").ids
    accepted = written.read(settings(), *parts, "test").scores(bundle.confidence)
    accepted = accepted > bundle.accept_above
    sure = np.array([int(i[:4], 16) for i in ids]) / 0xFFFF
    says_yes = np.array([int(i[4:8], 16) for i in ids]) / 0xFFFF < 0.5 + sure / 2
    gold = {row["id"]: row["gold"] for row in dataset.read(parts[0]).to_pylist()}
    is_yes = np.array([gold[i] == "yes" for i in ids])  # the teacher always says so
    test = json.loads((tmp_path / "bundle" / "manifest.json").read_text())["test"]
    assert test == {
        "n": 100,
        "n_accepted": accepted.sum(),
        "n_accepted_differs": (accepted & ~says_yes).sum(),
        "student": (says_yes == is_yes).sum(),
        "teacher": is_yes.sum(),
        "cascade": np.where(accepted, says_yes == is_yes, is_yes).sum(),
    }
    assert 0 < test["n_accepted_differs"] < test["n_accepted"] < 100


def test_answers_are_asked_for_once_and_rows_spend_their_delta(certify, tmp_path: Path):
    first = certify(settings(max_delta=0.25))
    again = certify(settings(max_delta=0.25, alpha=0.3))
    assert certify.engine.asked == ["{{ text }}"] and len(again.ledger) == 2
    assert again.served.n_accepted > first.served.n_accepted
    with pytest.raises(DataError, match=r"have spent 0\.2 of 0\.25"):
        certify(settings(max_delta=0.25, alpha=0.25))
    assert bundles.load_any(tmp_path / "bundle") == again
    other = dataclasses.replace(STUDENT, weights_digest="o" * 64)
    with pytest.raises(AssertionError):  # asks anew: the stand-in knows one student
        certify(settings(), other)


def test_a_killed_run_goes_on_with_the_answers_that_it_has(certify, tmp_path: Path):
    certify.engine = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "label", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            certify()
    prompts = tmp_path / "answers" / "prompts" / "manifest.json"
    before = prompts.stat().st_mtime_ns
    assert not (tmp_path / "bundle").exists()
    assert certify().served.feasible
    assert prompts.stat().st_mtime_ns == before


def test_a_student_that_is_never_sure_escalates_everything(certify, tmp_path: Path):
    engine = Engine(lambda row: said("", []))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "label", engine.label)
        bundle = certify()
    assert bundle.threshold is None and not bundle.served.feasible
    assert "Escalate everything" in bundle.recommendation


def test_serving_says_that_it_takes_classifiers(certify, tmp_path: Path):
    certify()
    with pytest.raises(BundleMismatch, match="of a student that writes"):
        bundles.load(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("kind", "labels", "certified", "match"),
    [
        ("logits", {}, {}, "hold no answers"),
        ("generate", {}, {"per_class": True}, "per_class is for classes"),
        ("generate", {"structured": {"choice": ["a", "b"]}}, {}, r"labels\.structured"),
    ],
)
def test_what_cannot_be_certified_is_said(kind, labels, certified, match: str):
    with pytest.raises(RecipeError, match=match):
        written.check(settings(kind, labels, **certified))


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"match": "parsed"}, "go together"),
        ({"answer_pattern": "(?P<answer>.)"}, "go together"),
        ({"match": "parsed", "answer_pattern": "."}, "needs a group called answer"),
        ({"match": "parsed", "answer_pattern": "("}, "is not a regular expression"),
    ],
)
def test_a_pattern_that_finds_no_answer_is_refused(values: dict[str, Any], match: str):
    with pytest.raises(RecipeError, match=match):
        settings(**values)


COMPLETE = {"complete": {"words": 3, "max_tokens": 5}}


def test_where_labels_are_of_given_texts_both_write_on(tmp_path: Path, monkeypatch):
    asked = settings("logits", alpha=0.3, **COMPLETE)
    sources = [made.row(f"one two three {split} {i}", split)
               for split in ("calibrate", "certify") for i in range(200)]  # fmt: skip
    made.write_dataset(tmp_path / "t", asked.labels,
                       [[(row, made.logits([1, 2], made.distributions(1))) for row in sources]],
                       codec=made.TOP3)  # fmt: skip
    seen: dict[str, set[str]] = {}

    def label(by: Recipe, model: Model, prompts: Path, labels: Path, _: Any) -> None:
        rows = corpus.read_shard(prompts, corpus.read_manifest(prompts)["shards"][0]["name"])
        seen[by.teacher.model] = set(rows["text"].to_pylist())
        assert (by.labels.prompt, by.labels.max_tokens) == ("{{ text }}", 5)
        fates = [(row, said("a" if model == TEACHER or int(row["id"][:2], 16) % 4 else "b", [-0.5]))
                 for row in rows.to_pylist()]  # fmt: skip
        made.write_dataset(labels.parent / f"made-{labels.name}", by.labels, [fates],
                           codec=LIKELIEST)  # fmt: skip
        (labels.parent / f"made-{labels.name}" / "labels").rename(labels)

    monkeypatch.setattr(pipeline, "label", label)
    bundle = written.certify(
        asked, tmp_path / "t" / "labels", tmp_path / "t" / "corpus", STUDENT, TEACHER,
        tmp_path / "answers", tmp_path / "bundle", inputs="i", on_progress=print,
    )  # fmt: skip
    assert seen == {model: {"one two three"} for model in ("student", made.TEACHER["model"])}
    certify_ids = [row["id"] for row in sources if row["split"] == "certify"]
    differs = sum(int(i[:2], 16) % 4 == 0 for i in certify_ids)
    assert bundle.served.n == 200 and bundle.curve[-1].system_disagreement == pytest.approx(
        differs / 200
    )
    assert bundle.max_tokens == 5


def test_texts_that_a_cascade_kept_are_certified_whole_for_they_are_what_requests_bring():
    asked = settings("logits", **COMPLETE)
    assert written_answers.words_given(asked) == 3
    kept = asked.corpus.model_copy(update={"feedback": "kept"})
    assert written_answers.words_given(asked.model_copy(update={"corpus": kept})) is None


@pytest.mark.parametrize(
    ("labels", "complete"),
    [
        ({}, {"max_tokens": 5}),
        ({"context": "{{ text }}"}, {"words": 3}),
        ({"tokens": "ids"}, {"words": 3}),
    ],
)
def test_what_cannot_be_written_on_is_said(labels: dict[str, Any], complete: dict[str, Any]):
    with pytest.raises(RecipeError, match=r"certify\.complete: give words where nothing"):
        written.check(settings("logits", labels, complete=complete))


def test_behind_a_context_its_answer_is_what_is_written():
    asked = written.check(settings("logits", {"context": "Q: {{ text }}"}, complete={}))
    assert (asked.prompt, asked.max_tokens, asked.k) == ("Q: {{ text }}", 8, 1)


def test_settings_of_before_there_was_a_match_are_the_same(certify):
    assert not {"match", "answer_pattern"} & set(settings().certify.decisive())
    assert "match" in settings(match="parsed", answer_pattern="(?P<answer>.)").certify.decisive()


# --- with real engines ---


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_pruned_student_is_certified_on_what_it_writes(
    ray_cluster: None, teacher_model: Model, tmp_path: Path
):
    from tests.conftest import DEMO

    asked = recipe.load(DEMO, [
        "name=writes", f"output={tmp_path}", "corpus.rows_per_shard=60",
        "corpus.limits={train: 96, calibrate: 30, certify: 60, test: 10}",
        'labels={kind: generate, prompt: "{{ text }}", chat: true, max_tokens: 4, k: 8}',
        "student={model: " + teacher_model.reference + ", kind: causal, start: pruned, layers: 24}",
        "training={workers: 1, epochs: 1, batch_size: 16, cpus_per_worker: 0.5}",
        "certify={alpha: 0.4}",
    ])  # fmt: skip
    run = steps.Run(asked)
    for name in ("prepare", "label", "train", "certify"):
        run.execute(name)
    bundle = bundles.load_any(run.path("certify"))
    assert isinstance(bundle, WrittenBundle) and bundle.served.n == 60
    answers = dataset.read(run.directory / "answers" / "labels")
    assert sorted(set(answers["split"].to_pylist())) == ["calibrate", "certify", "test"]

    # What was stored of the student's words, against transformers.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    student = models.resolve(str(run.path("train")))
    model = AutoModelForCausalLM.from_pretrained(student.path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(student.path)
    codec = dataset.codec_of(
        dataset.finished_manifest(LabelStore(run.directory / "answers/labels"))
    )
    assert codec is not None
    names = [s["name"] for s in corpus.read_manifest(run.corpus)["shards"]]
    texts = {
        r["id"]: r["text"] for n in names for r in corpus.read_shard(run.corpus, n).to_pylist()
    }
    for row in answers.slice(0, 5).to_pylist():
        turns = [{"role": "user", "content": texts[row["id"]]}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        ids = codec.unpack_ids(row["token_ids"]).tolist()
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
        wanted = logits.double().log_softmax(-1)[range(len(ids)), ids]
        stored = codec.decode(row["logprobs"], row["n_positions"]).logprobs[:, 0]
        np.testing.assert_allclose(stored, wanted.numpy(), atol=4e-3)
    assert run.execute("certify").seconds is None
