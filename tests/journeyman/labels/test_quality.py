"""Filters over finished labels: what each measures, and what readers are left with."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from journeyman.errors import DataError, RecipeError
from journeyman.labels import dataset, quality
from journeyman.labels.codec import Codec
from journeyman.labels.prior import corrected
from journeyman.labels.quality import Failure
from journeyman.labels.store import LabelStore
from journeyman.recipe import Filters
from journeyman.teacher.answers import Labeled, LogitLabels, Recorded
from tests.journeyman.labels.synthetic import (
    TOP3,
    VOCABULARY,
    classes,
    distributions,
    generated,
    logits,
    rationales,
    recipe_of,
    row,
    settings,
    table,
    write_dataset,
)

# --- which filters go with which labels ---


@pytest.mark.parametrize(
    ("kind", "more", "filters", "words"),
    [
        ("classes", {}, {"min_agreement": 0.6}, "min_agreement: it compares the samples of ration"),
        ("classes", {}, {"max_repetition": 0.5}, "max_repetition: classes writes no answer"),
        ("classes", {}, {"min_tokens": 5}, "min_tokens: it counts tokens of an answer or of a"),
        ("classes", {"scoring": "channel", "prompt": "{{ label }}"}, {"min_label_mass": 0.1},
         "min_label_mass: channel scoring puts no probability on label words"),
        ("logits", {}, {"min_label_mass": 0.1}, "min_label_mass: logits have no label words"),
        ("logits", {}, {"matches_gold": True}, "matches_gold: logits gives no answer to compare"),
        ("logits", {}, {"finished": True}, "finished: logits writes no answer"),
        ("rationales", {"samples": 1}, {"min_agreement": 0.6}, "with one sample agreement is"),
        ("rationales", {}, {"max_entropy": 1.0}, "rationales without classes record no distrib"),
        ("generate", {}, {"min_tokens": 9, "max_tokens": 3}, "min_tokens 9 is above max_tokens 3"),
    ],
)  # fmt: skip
def test_a_filter_that_says_nothing_of_its_kind_is_refused(kind, more, filters, words):
    with pytest.raises(RecipeError, match=words):
        quality.check(settings(kind, **more, filters=filters))


@pytest.mark.parametrize(
    ("kind", "filters"),
    [
        ("classes", {"min_label_mass": 0.1, "max_entropy": 0.5, "matches_gold": True}),
        ("logits", {"max_entropy": 0.5, "min_tokens": 2, "max_tokens": 9}),
        ("generate", {"max_entropy": 1, "min_tokens": 1, "max_repetition": 0.5, "finished": True}),
        ("rationales", {"min_agreement": 0.6, "finished": True, "matches_gold": True}),
        ("classes", {"finished": False, "matches_gold": False}),
    ],
)
def test_filters_that_fit_pass(kind, filters):
    quality.check(settings(kind, filters=filters))


def test_rationales_with_classes_have_entropy_and_label_mass():
    over = {"yes": "Yes", "no": "No"}
    quality.check(settings("rationales", classes=over, filters={"max_entropy": 1}))
    quality.check(settings("rationales", classes=over, filters={"min_label_mass": 0.1}))


def test_matches_gold_without_gold_labels_is_refused():
    with pytest.raises(RecipeError, match=r"corpus\.columns\.label names none"):
        quality.check(settings("classes", filters={"matches_gold": True}), has_gold=False)


# --- what they measure ---


def failures(
    kind: str, labeled: list[tuple[str | None, Labeled]], codec: Codec = TOP3, log_prior=None,
    labels: dict | None = None, **filters: object,
) -> list[Failure]:  # fmt: skip
    return quality.failed(
        table(kind, labeled, codec),
        settings(kind, **labels or {}),
        Filters(**filters),
        codec,
        log_prior,
    )


def test_class_entropy_is_that_of_the_corrected_distribution():
    probabilities = np.array([[0.9, 0.1], [0.5, 0.5], [1.0, 0.0]])
    log_prior = np.log([0.8, 0.2])
    with np.errstate(divide="ignore"):
        logprobs = corrected(np.log(probabilities), log_prior)
    weighed = probabilities / np.exp(log_prior)
    expected = [entropy(p / p.sum()) for p in weighed]
    np.testing.assert_allclose(quality.class_entropies(logprobs), expected, atol=1e-12)


def test_max_entropy_of_classes_is_measured_after_prior_correction():
    labeled = [(None, classes(0.9, 0.1)), (None, classes(0.5, 0.5))]
    assert [f.row for f in failures("classes", labeled, max_entropy=0.5)] == [1]
    prior = np.log([0.9, 0.1])  # what looked sure is the prior, and what looked unsure is not
    found = failures("classes", labeled, log_prior=prior, max_entropy=0.5)
    assert [f.row for f in found] == [0]
    assert found[0].value == pytest.approx(math.log(2), abs=1e-6)


def test_token_entropy_is_the_mean_over_positions_with_the_tail_as_one_token():
    probabilities = distributions(4)
    largest = np.sort(probabilities, axis=1)[:, ::-1][:, :3]
    merged = np.column_stack([largest, 1 - largest.sum(axis=1)])
    expected = entropy(merged, axis=1).mean()
    found = quality.token_entropies(table("logits", [(None, logits([1, 2, 3, 4], probabilities))]),
                                    TOP3)  # fmt: skip
    assert found == pytest.approx([expected], abs=5e-3)  # the codec's rounding
    assert found[0] <= entropy(probabilities, axis=1).mean()


def test_entropy_of_sampled_draws_is_corrected_for_their_number():
    codec = Codec(name="sampled", vocab_size=VOCABULARY, k=50)
    probabilities = distributions(200)
    rng = np.random.default_rng(0)
    draws = np.stack([rng.choice(VOCABULARY, size=50, p=p) for p in probabilities])
    recorded = Recorded(token_ids=draws, logprobs=np.zeros(draws.shape, dtype=np.float32))
    said = LogitLabels(
        n_prompt_tokens=1, n_output_tokens=1, token_ids=draws[:, 0], recorded=recorded
    )
    found = quality.token_entropies(table("logits", [(None, said)], codec), codec)[0]
    counts = np.stack([np.bincount(d, minlength=VOCABULARY) for d in draws])
    plain, exact = entropy(counts, axis=1).mean(), entropy(probabilities, axis=1).mean()
    assert found == pytest.approx(plain + ((counts > 0).sum(axis=1).mean() - 1) / 100, abs=1e-6)
    assert plain < found < exact


def test_a_row_without_distributions_fails_no_entropy_filter():
    labeled = [(None, generated("hi", [1, 2], distributions(2)))]
    from_url = table("generate", labeled, None)
    assert from_url["logprobs"].null_count == 1
    wanted = Filters(max_entropy=0.0)
    assert quality.failed(from_url, settings("generate"), wanted, TOP3) == []
    assert quality.failed(from_url, settings("generate"), wanted, None) == []


def test_label_mass_and_agreement_fail_below_their_bound_not_at_it():
    labeled = [(None, classes(0.5, 0.5, label_mass=m)) for m in (0.25, 0.24, None)]
    assert failures("classes", labeled, min_label_mass=0.25) == [
        Failure(1, "min_label_mass", pytest.approx(0.24))
    ]
    sampled = [(None, rationales([*"aaabb"])), (None, rationales(["a", "a", "b", "c", None]))]
    assert failures("rationales", sampled, min_agreement=0.6) == [
        Failure(1, "min_agreement", pytest.approx(0.4))
    ]


def test_tokens_are_those_of_the_answer_or_of_the_text_scored():
    labeled = [(None, logits(range(n), distributions(n))) for n in (2, 3, 4, 5)]
    found = failures("logits", labeled, min_tokens=3, max_tokens=4)
    assert found == [Failure(0, "min_tokens", 2.0), Failure(3, "max_tokens", 5.0)]


def test_tokens_of_rationales_are_the_mean_of_the_samples_without_the_second_pass():
    over = {"classes": {"yes": "Yes", "no": "No"}}
    said = rationales(
        ["yes", "yes", "no", "yes", None],
        class_logprobs=np.log(np.array([0.7, 0.3], dtype=np.float32)),
        label_mass=0.5,
        n_output_tokens=50 + 4 * 2,  # four parsed samples, each with two labels scored behind it
    )
    found = failures("rationales", [(None, said)], labels=over, min_tokens=11)
    assert found == [Failure(0, "min_tokens", 10.0)]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("a b c d e f", 0.0),
        ("a b c d a b c d", 0.2),  # abcd bcda cdab dabc | abcd
        ("no " * 10, 6 / 7),
    ],
)
def test_repetition_by_hand(text: str, share: float):
    assert quality.repetition(text) == pytest.approx(share)


@given(st.lists(st.sampled_from("abc"), max_size=60))
def test_repetition_counts_the_4_grams_that_stood_before(words: list[str]):
    grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    before = sum(gram in grams[:i] for i, gram in enumerate(grams))
    expected = before / len(grams) if grams else 0.0
    assert quality.repetition(" ".join(words)) == pytest.approx(expected)


def test_repetitive_and_unfinished_answers_fail():
    fine = generated("a fine answer", [1, 2, 3], distributions(3))
    stuck = generated("no " * 20, [1] * 20, distributions(20), finish_reason="length")
    labeled = [(None, fine), (None, stuck)]
    assert failures("generate", labeled, finished=True) == [Failure(1, "finished", 20.0)]
    assert failures("generate", labeled, max_repetition=0.5) == [
        Failure(1, "max_repetition", pytest.approx(16 / 17))
    ]


def test_the_gold_class_is_compared_after_prior_correction_and_rows_without_gold_stay():
    labeled = [("yes", classes(0.6, 0.4)), ("no", classes(0.6, 0.4)), (None, classes(0.6, 0.4))]
    assert failures("classes", labeled, matches_gold=True) == [
        Failure(1, "matches_gold", pytest.approx(0.4))
    ]
    prior = np.log([0.8, 0.2])
    found = failures("classes", labeled, log_prior=prior, matches_gold=True)
    assert [f.row for f in found] == [0]
    assert found[0].value == pytest.approx((0.6 / 0.8) / (0.6 / 0.8 + 0.4 / 0.2))


def test_written_answers_are_compared_with_gold_as_text_number_or_class():
    def wrong(kind: str, labels: dict, pairs: list[tuple[str, str]]) -> list[int]:
        make = rationales if kind == "rationales" else None
        said = [(gold, make([answer]) if make else generated(answer, [1], distributions(1)))
                for answer, gold in pairs]  # fmt: skip
        return [f.row for f in failures(kind, said, labels=labels, matches_gold=True)]

    assert wrong("generate", {}, [(" Paris\n", "Paris"), ("paris", "Paris")]) == [1]
    assert wrong("rationales", {}, [("paris", "Paris"), ("Rome", "Paris")]) == [1]
    pairs = [("1000", "$1,000.00"), ("1000", "#### 1000"), ("10", "100"), ("12.5", "12.50")]
    assert wrong("rationales", {"number": True}, pairs) == [2]
    named = {"classes": {"pos": "It is good", "neg": "It is bad"}}
    pairs = [("pos", "pos"), ("it is good", "pos"), ("It is bad", "pos")]
    assert wrong("rationales", named, pairs) == [2]


def test_the_first_filter_that_fails_counts_and_no_filter_fails_nothing():
    labeled = [("no", classes(0.5, 0.5, label_mass=0.01)), ("no", classes(0.5, 0.5))]
    every = {"matches_gold": True, "max_entropy": 0.1, "min_label_mass": 0.1}
    assert [(f.row, f.filter) for f in failures("classes", labeled, **every)] == [
        (0, "min_label_mass"),
        (1, "max_entropy"),
    ]
    assert failures("classes", labeled) == []
    assert failures("classes", []) == []
    assert failures("classes", [], **every) == []


def test_the_bound_0_is_a_bound():
    labeled = [(None, classes(0.5, 0.5))]
    assert [f.filter for f in failures("classes", labeled, max_entropy=0.0)] == ["max_entropy"]


# --- over a dataset ---

MASSES = {"low": 0.05, "middle": 0.3, "high": 0.9}


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    """Three rows of differing label mass, in two shards."""
    rows = [(row(text), classes(0.9, 0.1, label_mass=m)) for text, m in MASSES.items()]
    return write_dataset(tmp_path, settings("classes"), [rows[:2], rows[2:]])


def apply(store: LabelStore, **filters: object) -> dict:
    facts = quality.apply(store, store.manifest(), recipe_of("classes", filters=filters))
    return store.finish(facts)["filtered"]


def texts_left(store: LabelStore, **options: bool) -> list[str]:
    names = {row(text)["id"]: text for text in MASSES}
    return [names[i] for i in dataset.read(store.where, **options)["id"].to_pylist()]


def test_readers_leave_out_what_filters_leave_out_and_the_reasons_are_kept(store: LabelStore):
    filtered = apply(store, min_label_mass=0.1)
    assert filtered["rows"] == 1
    assert filtered["by_filter"] == {"min_label_mass": 1}
    assert filtered["filters"] == {"min_label_mass": 0.1}
    assert store.read_table(filtered["file"]).to_pylist() == [
        {"id": row("low")["id"], "filter": "min_label_mass", "value": pytest.approx(0.05)}
    ]
    assert texts_left(store) == ["middle", "high"]
    assert texts_left(store, filtered=True) == ["low", "middle", "high"]


def test_other_filters_read_the_labels_again_and_the_same_ones_do_not(
    store: LabelStore, monkeypatch: pytest.MonkeyPatch
):
    apply(store, min_label_mass=0.1)
    apply(store, min_label_mass=0.5)
    assert texts_left(store) == ["high"]
    with monkeypatch.context() as patched:
        patched.setattr(LabelStore, "read_shard", None)
        apply(store, min_label_mass=0.5)
    apply(store)
    assert texts_left(store) == ["low", "middle", "high"]
    assert store.manifest()["filtered"]["rows"] == 0


def test_filters_that_leave_no_row_are_refused_and_change_nothing(store: LabelStore):
    apply(store, min_label_mass=0.1)
    with pytest.raises(DataError, match="leave out all 3 labeled train rows, 3 of them"):
        apply(store, min_label_mass=0.95)
    assert texts_left(store) == ["middle", "high"]


def test_rows_that_are_held_out_stay_whatever_filters_say(tmp_path: Path):
    masses = ((0.05, "certify"), (0.06, "test"), (0.07, "train"), (0.9, "train"))
    rows = [(row(f"{m}", split), classes(0.9, 0.1, label_mass=m)) for m, split in masses]
    kept = write_dataset(tmp_path, settings("classes"), [rows])
    assert apply(kept, min_label_mass=0.5)["rows"] == 1
    assert dataset.read(kept.where)["split"].to_pylist() == ["certify", "test", "train"]


def test_filters_are_no_part_of_what_the_teacher_was_asked():
    assert settings("classes", filters={"max_entropy": 1}).asked() == settings("classes").asked()
