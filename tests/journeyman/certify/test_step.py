"""The certify step on made-up rows: every guarantee, and that serving decides as was certified."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from journeyman import recipe
from journeyman.cascade.policy import Decision, Policy
from journeyman.certify import bundle as bundles
from journeyman.certify.accuracy import certify_accuracy, design_against_gold
from journeyman.certify.step import certify
from journeyman.errors import DataError
from journeyman.labels.dataset import ClassRows
from journeyman.models import Model

DEMO = Path(__file__).parents[3] / "jobs" / "recipes" / "routing.yaml"
LABELS = tuple(yaml.safe_load(DEMO.read_text())["labels"]["classes"])
N = {"calibrate": 300, "certify": 700, "test": 50}


class Scorer:
    """A student whose logits are known by text."""

    def __init__(self, logits: np.ndarray) -> None:
        self._logits = logits

    def logits(self, texts, batch_size: int = 32):
        return self._logits[[int(text) for text in texts]]


def some_rows(student_skill: float, teacher_skill: float, gold_share: float = 1.0, seed: int = 0):
    rng = np.random.default_rng(seed)
    n = sum(N.values())
    gold = rng.integers(0, 4, n)
    hard = rng.normal(size=(n, 4))

    def logits(skill):
        return skill * np.eye(4)[gold] + hard + 0.6 * rng.normal(size=(n, 4))

    student, teacher = logits(student_skill).astype(np.float32), logits(teacher_skill)
    rows = ClassRows(
        labels=LABELS,
        ids=[f"{i:032x}" for i in range(n)],
        texts=[str(i) for i in range(n)],
        splits=np.array([name for name, k in N.items() for _ in range(k)], dtype=object),
        gold=np.where(rng.random(n) < gold_share, gold, -1),
        logprobs=teacher - np.logaddexp.reduce(teacher, axis=1, keepdims=True),
    )
    return rows, student


def certified(tmp_path, rows, student, *overrides, repeats=None):
    settings = recipe.load(DEMO, ["certify={alpha: 0.1, besides: []}", *overrides])
    model = Model(
        reference="m", path=tmp_path, weights_digest="w", tokenizer_digest="t", size_bytes=1
    )
    return certify(
        settings, rows, None, Scorer(student), model, model, tmp_path / "bundle", inputs="i",
        repeats=repeats,
    )  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ["certify.guarantee=system_agreement"],
        ["certify.guarantee=selective_agreement"],
        ["certify.guarantee=accuracy"],
        ["certify.guarantee=system_agreement", "certify.besides=[accuracy,selective_agreement]"],
        ["certify.per_class=true"],
        ["certify={guarantee: selective_agreement, per_class: true, alpha: 0.3}"],
        ["certify.scores=[deferral_head]"],
        ["certify={guarantee: accuracy, scores: [deferral_head], alpha: 0.05}"],
    ],
)
def test_served_decisions_are_those_that_were_certified(tmp_path, overrides):
    rows, student = some_rows(2.0, 2.6)
    made = certified(tmp_path, rows, student, *overrides)
    bundle = bundles.load(tmp_path / "bundle")
    assert bundle == made
    policy = Policy.from_bundle(bundle)
    of_certify = np.flatnonzero(rows.splits == "certify")
    decisions = [policy.decide(student[i]) for i in of_certify]  # one request at a time
    answered = np.array([isinstance(d, Decision) for d in decisions])
    served = bundle.guarantees[0]
    assert 0 < served.n_accepted == answered.sum() < len(answered)
    gold, answers = rows.gold[of_certify], student[of_certify].argmax(axis=1)
    teacher = rows.logprobs[of_certify].argmax(axis=1)
    wrong = (
        (teacher == gold) & (answers != gold) if served.kind == "accuracy" else answers != teacher
    )
    assert (answered & wrong).sum() == served.errors
    assert len(bundle.ledger) == len(bundle.guarantees)
    if bundle.class_guarantees:
        for answer, own in enumerate(bundle.class_guarantees):
            assert (answered & (answers == answer)).sum() == own.n_accepted
            assert own.delta == pytest.approx(served.delta / 4)


def test_a_bundle_keeps_how_long_its_longest_row_was(tmp_path):
    rows, student = some_rows(2.0, 2.6)
    bundle = certified(tmp_path, rows, student)
    assert bundle.longest == max(map(len, rows.texts))
    pairs = replace(rows, metas=[{"passage": "x" * i} for i in range(len(rows))])
    of_two = certified(tmp_path / "two", pairs, student, "corpus.columns.meta=[passage]",
                       "labels.prompt='{{ passage }}, on {{ label }}: '")  # fmt: skip
    assert of_two.longest == len(rows) - 1 + len(rows.texts[-1])


@pytest.mark.parametrize("guarantee", ["system_agreement", "accuracy"])
def test_with_two_opinions_the_promise_is_about_the_answer_that_both_give(tmp_path, guarantee):
    rows, student = some_rows(2.0, 2.2)
    overrides = (f"certify.guarantee={guarantee}", "cascade.combine=mixture")
    bundle = certified(tmp_path, rows, student, *overrides)
    assert bundle.mixture is not None and 0 < bundle.mixture.student_weight < 1
    policy = Policy.from_bundle(bundles.load(tmp_path / "bundle"))
    errors = gains = 0
    for i in np.flatnonzero(rows.splits == "certify"):
        decision = policy.decide(student[i])
        if isinstance(decision, Decision):
            both = LABELS.index(policy.teacher_decision(rows.logprobs[i], decision).label)
            own, gold = LABELS.index(decision.label), rows.gold[i]
            costs = both != own if guarantee == "system_agreement" else both == gold != own
            errors, gains = errors + costs, gains + (own == gold != both)
    assert errors == bundle.served.errors
    assert guarantee == "system_agreement" or gains == bundle.served.gains
    # It is certified against a better answer than the teacher's.
    alone = certified(tmp_path / "alone", rows, student, overrides[0])
    assert bundle.teacher_accuracy is not None and alone.teacher_accuracy is not None
    assert bundle.teacher_accuracy > alone.teacher_accuracy


def test_two_opinions_are_weighed_by_gold(tmp_path):
    rows, student = some_rows(2.0, 2.2, gold_share=0.0)
    with pytest.raises(DataError, match=r"mixture is fitted on calibrate rows with gold"):
        certified(tmp_path, rows, student, "cascade.combine=mixture")


def test_guarantees_besides_are_those_that_would_be_served_alone(tmp_path):
    rows, student = some_rows(2.0, 2.6)
    fixed = "certify.scores=[margin]"
    both = certified(tmp_path / "both", rows, student, fixed, "certify.besides=[accuracy]")
    alone = certified(tmp_path / "alone", rows, student, fixed, "certify.guarantee=accuracy")
    assert both.guarantees[1] == alone.guarantees[0]
    assert both.threshold != alone.threshold


def test_where_the_student_is_better_gold_lets_it_answer_everything_and_agreement_does_not(
    tmp_path,
):
    rows, student = some_rows(3.2, 2.0)
    both = certified(tmp_path, rows, student, "certify={alpha: 0.05, besides: [accuracy]}")
    agreement, accuracy = both.guarantees
    assert agreement.n_accepted < 0.9 * N["certify"]
    assert accuracy.n_accepted == N["certify"] and accuracy.gains > accuracy.errors
    assert "certify against gold (certify.guarantee: accuracy)" in both.recommendation
    served = certified(tmp_path / "gold", rows, student, "certify.guarantee=accuracy")
    assert "answer 100.0% of requests" in served.recommendation
    assert "wrong promise" not in served.recommendation


@pytest.mark.parametrize("kind", ["system_agreement", "selective_agreement"])
def test_the_bundle_says_that_texts_count_once_and_what_their_repeats_would_make_of_it(
    tmp_path, kind: str
):
    rows, student = some_rows(2.0, 2.6)
    override = f"certify.guarantee={kind}"
    once = certified(tmp_path / "once", rows, student, override)
    assert "distinct texts" not in once.recommendation
    rng = np.random.default_rng(3)
    often = {row_id: int(rng.integers(1, 9)) for row_id in rows.ids}
    bundle = certified(tmp_path / "often", rows, student, override, repeats=often)
    assert bundle.guarantees == once.guarantees
    policy = Policy.from_bundle(bundle)
    answered = wrong = total = 0
    for i in np.flatnonzero(rows.splits == "certify"):
        n = often[rows.ids[i]]
        total += n
        if isinstance(policy.decide(student[i]), Decision):
            answered += n
            wrong += n * (student[i].argmax() != rows.logprobs[i].argmax())
    of = total if kind == "system_agreement" else answered
    said = bundle.recommendation
    assert f"certify rows are distinct texts, which stood {total:,} times in the sources" in said
    assert f"without any bound, {wrong / of:.2%} are answered otherwise" in said


def test_rows_without_gold_do_not_count_against_gold(tmp_path):
    rows, student = some_rows(2.0, 2.6, gold_share=0.7)
    got = certified(tmp_path, rows, student, "certify={guarantee: accuracy, scores: [margin]}")
    known = rows.take(np.flatnonzero(rows.gold >= 0))
    assert got.guarantees[0].n == len(known.split("certify")) < N["certify"]
    confidence = got.confidence.of(student)[1]

    def of(split):
        index = np.flatnonzero((rows.splits == split) & (rows.gold >= 0))
        right = [rows.logprobs[index].argmax(axis=1), student[index].argmax(axis=1)]
        losses = [(r == rows.gold[index]).astype(int) for r in right]
        return confidence[index], losses[0] - losses[1]

    design = design_against_gold(*of("calibrate"), got.guarantees[0].n, 0.05, 0.1)
    by_hand = certify_accuracy(*of("certify"), 0.05, 0.1, design)
    assert bundles.Guarantee.from_certificate(by_hand) == got.guarantees[0]


def test_no_gold_at_all_is_one_sentence(tmp_path):
    rows, student = some_rows(2.0, 2.6, gold_share=0.0)
    with pytest.raises(DataError, match=r"needs gold labels.*none has one"):
        certified(tmp_path, rows, student, "certify.guarantee=accuracy")
    assert not (tmp_path / "bundle").exists()


def test_certify_rows_that_have_spent_their_delta_are_refused(tmp_path):
    rows, student = some_rows(2.0, 2.6)
    both = "certify.besides=[accuracy]"
    for score in ("margin", "entropy"):
        certified(tmp_path, rows, student, both, f"certify.scores=[{score}]")
    with pytest.raises(DataError, match=r"spent 0\.4 of 0\.5 on: system_agreement.* 0\.2 more"):
        certified(tmp_path, rows, student, both)
    assert len(bundles.load(tmp_path / "bundle").ledger) == 4
