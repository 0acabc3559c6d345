"""Planned rows against simulation of the very certificates they are planned for."""

import numpy as np
import pytest
from scipy.stats import binom, binomtest

from journeyman.certify.accuracy import drop_passes
from journeyman.certify.certificate import certify_system_agreement, rows_needed
from journeyman.certify.planning import Expected, chance_to_certify, plan_rows
from journeyman.certify.selective import SelectiveDesign, certify_selective_agreement
from journeyman.cli import main
from journeyman.errors import RecipeError
from tests.conftest import DEMO

DELTA = 0.1


def test_without_an_error_the_design_documents_number_of_rows_is_planned():
    for alpha, delta in [(0.01, 0.05), (0.02, 0.1), (0.1, 0.1)]:
        got = plan_rows("system_agreement", alpha, delta, Expected(rate=0.0))
        assert got.n == rows_needed(alpha, delta)
    assert plan_rows("system_agreement", 0.01, 0.05, Expected(rate=0.0)).n == 299


def test_chance_is_that_of_simulated_certificates():
    rng = np.random.default_rng(0)
    n, alpha, draws = 300, 0.1, 800

    def certified(kind, certify, rate, coverage):
        answered = round(coverage * n)
        scores = np.concatenate([np.full(answered, 1.0), np.zeros(n - answered)])
        count = 0
        for _ in range(draws):
            differs = np.concatenate([rng.random(answered) < rate, np.ones(n - answered, bool)])
            count += certify(scores, differs, alpha, DELTA).n_accepted >= answered
        system = kind == "system_agreement"
        expected = Expected(
            rate=rate * (coverage if system else 1), coverage=1.0 if system else coverage
        )
        chance = chance_to_certify(kind, alpha, DELTA, expected, n)
        assert 0.2 < chance < 0.98
        # Of system agreement the count among answered rows is a little less spread out.
        assert abs(count / draws - chance) < 0.06

    certified("system_agreement", certify_system_agreement, 0.08, 0.9)
    # One candidate, so that the sequence is that one test.
    alone = SelectiveDesign(
        thresholds=np.array([0.5]), sequence_share=0.9, min_agreements=0, coverage=0.8
    )

    def by_sequence(scores, differs, alpha, delta):
        return certify_selective_agreement(scores, differs, alpha, delta, alone)

    certified("selective_agreement", by_sequence, 0.06, 0.8)


def test_chance_against_gold_is_that_of_every_outcome():
    n, alpha, rate, gains = 120, 0.1, 0.05, 0.06
    expected = 0.0
    for either in range(n + 1):
        losses = np.arange(either + 1)
        passing = drop_passes(losses, either - losses, n, alpha, 0.9 * DELTA)
        given = binom.pmf(losses, either, rate / (rate + gains))[passing].sum()
        expected += binom.pmf(either, n, rate + gains) * given
    got = chance_to_certify("accuracy", alpha, DELTA, Expected(rate=rate, gains=gains), n)
    assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("system_agreement", Expected(rate=0.06)),
        ("selective_agreement", Expected(rate=0.06, coverage=0.7)),
        ("accuracy", Expected(rate=0.05, gains=0.04)),
        ("accuracy", Expected(rate=0.0)),
    ],
)
def test_planned_rows_reach_the_chance_and_much_fewer_do_not(kind, expected):
    got = plan_rows(kind, 0.1, DELTA, expected, chance=0.8)
    assert got.n is not None
    assert chance_to_certify(kind, 0.1, DELTA, expected, got.n) >= 0.8
    assert chance_to_certify(kind, 0.1, DELTA, expected, int(0.8 * got.n)) < 0.8
    share = expected.coverage if kind == "selective_agreement" else 1
    assert got.errors == pytest.approx(got.n * share * expected.rate)


def test_a_risk_that_is_not_below_the_target_has_no_plan():
    assert plan_rows("system_agreement", 0.05, DELTA, Expected(rate=0.05)).n is None
    assert plan_rows("accuracy", 0.05, DELTA, Expected(rate=0.08, gains=0.02)).n is None
    better = plan_rows("accuracy", 0.02, DELTA, Expected(rate=0.04, gains=0.09))
    assert better.n is not None and better.n < 500  # the demo's student


def test_wrong_plans_are_refused():
    for words, values in [
        ("--expected is 1.5", {"rate": 1.5}),
        ("--coverage is 0", {"rate": 0.1, "coverage": 0.0}),
        ("together", {"rate": 0.6, "gains": 0.6}),
    ]:
        with pytest.raises(RecipeError, match=words):
            Expected(**values)
    with pytest.raises(RecipeError, match="--chance is 1"):
        plan_rows("accuracy", 0.1, 0.1, Expected(rate=0.0), chance=1.0)


def plan(capsys, *arguments: str) -> str:
    assert main(["certify", str(DEMO), "--plan", *arguments]) == 0
    return capsys.readouterr().out


def test_the_command_plans_by_the_recipe_alone(capsys, tmp_path):
    out = plan(capsys, f"--set=output={tmp_path}")
    assert "system agreement within 10% at confidence 90%, certified in 90% of draws" in out
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    assert [row[0] for row in rows] == ["0%", "2.5%", "5%", "7.5%"]
    assert rows[0][1] == str(rows_needed(0.1, 0.1))
    assert "The recipe takes 500 rows" in out
    assert list(tmp_path.iterdir()) == []
    against_gold = ("--set=certify.guarantee=accuracy", "--expected=0.04", "--gains=0.09")
    assert "accuracy within 10%" in plan(capsys, *against_gold)
    per_class = plan(capsys, "--expected=0", "--set=certify={alpha: 0.1, per_class: true}")
    assert "for each of the student's answers" in per_class
    assert f" {rows_needed(0.1, 0.1 / 4)} " in per_class
    assert " - " in plan(capsys, "--expected=0.2")
    each = "--set=certify={alpha: 0.1, before: [runs/small], each_stage: true}"
    of_each = plan(capsys, "--expected=0", each)
    assert "system agreement within 5%" in of_each and "for each of 2 students" in of_each
    assert f" {rows_needed(0.05, 0.1 / 2)} " in of_each


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--plan", "--gains=0.1"], "--gains goes with certify.guarantee: accuracy"),
        (["--plan", "--coverage=0.1"], "--coverage goes with selective_agreement"),
        (["--plan", "--expected=2"], "--expected is 2"),
        (["--expected=0.1"], "--expected goes with --plan"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(capsys, arguments, words):
    assert main(["certify", str(DEMO), *arguments]) == 1
    assert words in capsys.readouterr().err


def test_rows_planned_for_a_threshold_certify_it_as_often_as_said():
    rng = np.random.default_rng(1)
    planned = plan_rows("system_agreement", 0.1, DELTA, Expected(rate=0.05)).n
    assert planned is not None
    passed = sum(
        certify_system_agreement(np.ones(planned), rng.random(planned) < 0.05, 0.1, DELTA).feasible
        for _ in range(600)
    )
    assert binomtest(passed, 600, 0.9, alternative="less").pvalue > 0.01
