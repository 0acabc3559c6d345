"""``journeyman label --try --take``: one way becomes the recipe's own, and no other way changes."""

from pathlib import Path

import numpy as np
import pytest

from journeyman import recipe
from journeyman.cli import main, trying
from journeyman.labels.candidates import judge
from journeyman.labels.trying import OWN, ways
from journeyman.recipe import Price
from tests.conftest import ROOT
from tests.journeyman.labels.test_candidates import asked

RECIPES = ROOT / "jobs" / "recipes"


def take(path: Path, name: str) -> None:
    """As if the trial had found this one best."""
    found = ways(recipe.load(path))
    judged = {one.name: one for one in judge(found, {n: asked([0.9, 0.1]) for n in found},
                                             np.array([1, 0]), Price())}  # fmt: skip
    trying._take(path, recipe.load(path), judged[name], list(judged.values()), OWN)


@pytest.mark.parametrize("name", ["policy", "filtering", "retrieval"])
def test_every_way_means_what_it_meant_when_one_after_the_other_is_taken(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((RECIPES / f"{name}.yaml").read_text())
    meant = {way: labels.asked() for way, labels in ways(recipe.load(path)).items()}
    first, second, *_ = [way for way in meant if way != OWN]
    take(path, first)
    now = ways(recipe.load(path))
    before = (set(now) - set(meant)).pop()
    assert before.startswith("before")
    assert now[OWN].asked() == meant[first] and now[before].asked() == meant[OWN]
    assert {way: now[way].asked() for way in now if way in meant and way != OWN} == {
        way: said for way, said in meant.items() if way not in (OWN, first)
    }
    take(path, second)
    now = ways(recipe.load(path))
    assert now[OWN].asked() == meant[second] and now[before].asked() == meant[OWN]
    assert now[first].asked() == meant[first]
    comments = [line for line in (RECIPES / f"{name}.yaml").read_text().split("\n")
                if line.startswith("#")]  # fmt: skip
    assert set(comments) <= set(path.read_text().split("\n"))


def test_a_way_that_was_named_on_the_command_line_alone_can_be_taken(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((RECIPES / "routing.yaml").read_text())
    own = recipe.load(path).classes()
    tried = recipe.load(path, ["labels.candidates={short: {prompt: 'About {{ label }}:'}}"])
    (judged,) = judge({"short": tried.classes()}, {"short": asked([0.9])}, np.array([1]), Price())
    trying._take(path, tried, judged, [judged], OWN)
    now = recipe.load(path).classes()
    assert now.prompt == "About {{ label }}:" and now.candidate("before").asked() == own.asked()


def test_where_there_is_no_other_way_nothing_can_be_taken(capsys) -> None:
    alone = ("--set", "labels.candidates={}")
    assert main(["label", str(RECIPES / "routing.yaml"), "--try", "--take", "best", *alone]) == 1
    assert "labels.candidates names no other way to ask" in capsys.readouterr().err


def test_what_the_file_does_not_say_is_not_written_as_its_evidence(tmp_path, capsys) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(before := (RECIPES / "policy.yaml").read_text())
    for other in (
        "labels.classes.answer=money",
        "teacher.max_model_len=256",
        "report.positive=answer",
    ):
        assert main(["label", str(path), "--try", "--take", "best", "--set", other]) == 1
        assert "put these settings of labels" in capsys.readouterr().err
    assert path.read_text() == before


def test_what_each_reached_is_written_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((RECIPES / "policy.yaml").read_text())
    take(path, "short")
    (line,) = [one for one in path.read_text().split("\n") if "short: 0.500 right of 2" in one]
    assert "balanced 0.500, AUC 1.000, ECE 0." in line and "tokens a row" in line
    assert "SmolLM2-135M-Instruct.Q4_1.gguf:" in path.read_text()
    assert "Taken by the AUC of refuse." in path.read_text()
