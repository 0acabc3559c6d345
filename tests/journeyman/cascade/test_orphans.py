"""Who is asked to take up what members left that are gone, and for how long."""

from journeyman.cascade import orphans
from journeyman.cascade.orphans import Orphans


def test_those_that_live_are_asked_in_turns_and_given_time():
    of, living, asked = Orphans(), ["a", "b", "c"], []
    for second in range(int(orphans.GIVEN_UP_AFTER_S)):
        assert of.given_up(["x"], second) == []
        asked += [one for one in living if of.offered(["x"], one, living, second)]
    assert asked[:6] == ["a", "b", "c"] * 2
    assert {one: asked.count(one) for one in living} == dict.fromkeys(living, 40)
    assert of.given_up(["x"], orphans.GIVEN_UP_AFTER_S) == ["x"]


def test_time_in_which_nobody_lived_is_none_in_which_one_is_given_up():
    """As where a bundle comes back after a day."""
    of = Orphans()
    assert of.given_up(["x"], 0.0) == [] and of.new == ["x"]
    assert of.given_up(["x"], 86400.0) == []
    assert of.given_up(["x"], 86430.0) == [] and of.new == []


def test_one_that_is_heard_again_and_then_gone_is_offered_anew():
    of = Orphans()
    assert of.given_up(["x"], 0.0) == [] and of.offered(["x"], "a", ["a"], 0.0) == "x"
    assert of.offered(["x"], "a", ["a"], 1.0) is None, "it has a while"
    assert of.given_up([], 2.0) == [] and of.offered([], "a", ["a"], 2.0) is None
    assert of.given_up(["x"], 3.0) == [] and of.new == ["x"]
    assert of.offered(["x"], "a", ["a"], 3.0) == "x"
