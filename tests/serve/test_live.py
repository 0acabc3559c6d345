"""One bundle in place of another, and a candidate beside it. No Ray, no models."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from scipy.stats import binomtest

from journeyman.errors import BundleMismatch, ClusterError
from serve.live import Live, Served


class Bundles:
    """Loads a bundle by its name, as slowly as told, and notes what is closed and shadowed."""

    def __init__(self) -> None:
        self.closed: list[str] = []
        self.loaded: list[str] = []
        self.shadowed: list[list[str]] = []
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.away: set[str] = set()
        self.longest_s: dict[str, float] = {}
        self.out_of_reach: set[str] = set()

    async def load(self, bundle: str | None, but_not: str) -> Served | None:
        await self.may_load.wait()
        name = (bundle or "a").rpartition("/")[2]
        if name == but_not:
            return None
        self.loaded.append(name)
        if name in self.out_of_reach:
            raise ClusterError(f"{name}: no answer from its store")
        if name == "bad":
            raise BundleMismatch("bad does not fit")
        if name == "broken":
            raise ZeroDivisionError
        return self.served(name)

    def served(self, name: str) -> Served:
        async def decide(texts: Any) -> None:
            if "poison" in texts:
                raise RuntimeError("poison")
            await self.may_load.wait()
            self.shadowed.append(list(texts))

        async def close() -> None:
            self.closed.append(name)

        bundle: Any = SimpleNamespace(bundle_id=name)
        return Served(
            bundle=bundle,
            answering=SimpleNamespace(),  # type: ignore[arg-type]
            figures=lambda: {"of": name},
            decide=decide,
            close=close,
            longest_s=self.longest_s.get(name, 0.01),
            unready=lambda: "its engine is gone" if name in self.away else None,
        )


def run(test) -> None:
    async def go() -> None:
        bundles = Bundles()
        await test(Live(bundles.served("a"), bundles.load), bundles)

    asyncio.run(go())


def now(live: Live, text: str = "x") -> str:
    return live.served([text]).bundle.bundle_id


async def settled(live: Live) -> None:
    while live._following and not live._following.done():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.03)  # and what was replaced is closed


def test_a_new_bundle_answers_once_it_is_loaded_and_the_old_one_is_closed_later():
    async def test(live: Live, bundles: Bundles) -> None:
        bundles.may_load.clear()
        live.follow({"bundle": "b"})
        await asyncio.sleep(0.01)
        assert now(live) == "a"  # still: it returned at once, and nothing waits
        bundles.may_load.set()
        await settled(live)
        assert now(live) == "b" and bundles.closed == ["a"] and live.failure is None

    run(test)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"bundle": "bad"}, "bad does not fit"),
        ({"bundle": "broken"}, "ZeroDivisionError"),
        ({"bundel": "b"}, "Extra inputs are not permitted"),
        ({"candidate": {"bundle": "b", "share": 2}}, "less than or equal to 1"),
    ],
)
def test_a_bad_bundle_never_harms_the_one_that_answers(config: dict, why: str):
    async def test(live: Live, bundles: Bundles) -> None:
        live.follow(config)
        await settled(live)
        assert now(live) == "a" and bundles.closed == []
        assert why in live.figures()["reload_failure"]
        live.follow({"bundle": "b"})
        await settled(live)
        assert now(live) == "b" and live.figures()["reload_failure"] is None

    run(test)


def test_each_bundle_has_its_own_longest_request_to_finish():
    async def test(live: Live, bundles: Bundles) -> None:
        bundles.longest_s = {"b": 0.3}
        for name in "bc":
            live.follow({"bundle": name})
            await settled(live)
        assert bundles.closed == ["a"]
        await asyncio.sleep(0.4)
        assert bundles.closed == ["a", "b"]

    run(test)


def test_the_last_word_counts_when_the_mind_changes_while_one_is_loaded():
    async def test(live: Live, bundles: Bundles) -> None:
        bundles.may_load.clear()
        for name in "bcd":
            live.follow({"bundle": name})
            await asyncio.sleep(0.002)
        bundles.may_load.set()
        await settled(live)
        assert now(live) == "d" and bundles.loaded[-1] == "d"
        assert set(bundles.closed) == {"a", *bundles.loaded} - {"d"}

    run(test)


def test_the_same_bundle_again_is_not_exchanged():
    async def test(live: Live, bundles: Bundles) -> None:
        before = live.served(["x"])
        live.follow({"bundle": "a"})
        await settled(live)
        assert live.served(["x"]) is before and not bundles.loaded and not bundles.closed
        live.follow({"bundle": "a", "candidate": {"bundle": "b"}})
        await settled(live)
        assert live.served(["x"]) is before and bundles.loaded == ["b"]
        live.follow({"candidate": {"bundle": "a"}})
        await settled(live)
        assert live.failure == "candidate: a answers already."

    run(test)


@pytest.mark.parametrize("without", [{}, {"bundle": None}, None])
def test_without_a_bundle_the_applications_own_answers_again(without: dict | None):
    async def test(live: Live, bundles: Bundles) -> None:
        live.follow(without)  # as where a replica starts
        await settled(live)
        assert not bundles.loaded
        live.follow({"bundle": "b"})
        await settled(live)
        assert now(live) == "b"
        live.follow(without)
        await settled(live)
        assert now(live) == "a" and bundles.closed == ["a", "b"]

    run(test)


def test_a_bundle_that_was_out_of_reach_is_tried_again(monkeypatch):
    monkeypatch.setattr("serve.live._FIRST_PAUSE_S", 0.005)

    async def test(live: Live, bundles: Bundles) -> None:
        bundles.out_of_reach = {"b", "c"}
        live.follow({"bundle": "b"})
        async with asyncio.timeout(10):
            while bundles.loaded.count("b") < 3:
                await asyncio.sleep(0.005)
        assert now(live) == "a" and live.failure == "b: no answer from its store"
        bundles.out_of_reach = {"c"}
        await settled(live)
        assert now(live) == "b" and live.failure is None
        live.follow({"bundle": "c"})
        await asyncio.sleep(0.02)
        live.follow({"bundle": "d"})  # is not kept waiting by a pause
        await settled(live)
        assert now(live) == "d" and live.failure is None

    run(test)


def test_a_canary_answers_its_share_and_a_text_stays_with_one():
    async def test(live: Live, bundles: Bundles) -> None:
        live.follow({"candidate": {"bundle": "b", "mode": "canary", "share": 0.2}})
        await settled(live)
        texts = [f"text {i}" for i in range(2000)]
        by = [now(live, text) for text in texts]
        assert binomtest(by.count("b"), 2000, 0.2).pvalue > 0.001
        assert [now(live, text) for text in texts] == by
        assert live.bundle.bundle_id == "a"
        assert live.figures()["candidate"] == {
            "bundle": "b", "mode": "canary", "share": 0.2, "not_shadowed": 0, "unready": None,
            "of": "b", "guarantee": "holds",
        }  # fmt: skip
        live.follow({})
        await settled(live)
        assert {now(live, text) for text in texts} == {"a"} and bundles.closed == ["b"]

    run(test)


@pytest.mark.parametrize("beside", [{}, {"candidate": {"bundle": "c", "mode": "canary"}}])
@pytest.mark.parametrize("bundle", ["bad", "broken", "far", "slow"])
def test_a_candidate_that_is_not_named_any_more_stops_whatever_becomes_of_the_rest(
    bundle: str, beside: dict
):
    async def test(live: Live, bundles: Bundles) -> None:
        bundles.out_of_reach = {"far"}
        live.follow({"candidate": {"bundle": "b", "mode": "canary"}})
        await settled(live)
        assert now(live) == "b"
        if bundle == "slow":
            bundles.may_load.clear()
        live.follow({"bundle": bundle, **beside})
        assert now(live) == "a"
        await asyncio.sleep(0.03)
        assert now(live) == "a" and bundles.closed == ["b"]

    run(test)


def test_a_candidate_that_was_on_its_way_when_it_was_taken_back_does_not_stay():
    async def test(live: Live, bundles: Bundles) -> None:
        bundles.may_load.clear()
        live.follow({"candidate": {"bundle": "b", "mode": "canary"}})
        await asyncio.sleep(0.005)
        live.follow({})
        bundles.may_load.set()
        await settled(live)
        assert now(live) == "a" and bundles.closed == bundles.loaded == ["b"]

    run(test)


def test_a_shadow_decides_on_the_same_texts_and_never_answers():
    async def test(live: Live, bundles: Bundles) -> None:
        live.follow({"candidate": {"bundle": "b", "mode": "shadow"}})
        await settled(live)
        assert {now(live, text) for text in ("x", "poison", "y")} == {"a"}
        await asyncio.sleep(0.01)
        assert bundles.shadowed == [["x"], ["y"]]
        assert live.failure == "shadow: RuntimeError"

    run(test)


@pytest.mark.parametrize("mode", ["canary", "shadow"])
def test_a_candidate_whose_student_is_away_is_left_out_and_says_why(mode: str):
    async def test(live: Live, bundles: Bundles) -> None:
        live.follow({"candidate": {"bundle": "b", "mode": mode}})
        await settled(live)
        bundles.away = {"b"}
        assert {now(live, str(i)) for i in range(9)} == {"a"} and live.unready is None
        await asyncio.sleep(0.01)
        tried = live.figures()["candidate"]
        assert tried["unready"] == "its engine is gone" and bundles.shadowed == []
        assert tried["not_shadowed"] == (9 if mode == "shadow" else 0)
        bundles.away = set()
        assert now(live) == ("b" if mode == "canary" else "a")

    run(test)


def test_a_replica_that_stops_closes_every_bundle_it_has():
    async def test(live: Live, bundles: Bundles) -> None:
        bundles.longest_s = {"b": 60}  # still answers what it began
        for config in ({"bundle": "b"}, {"bundle": "c", "candidate": {"bundle": "d"}}):
            live.follow(config)
            await settled(live)
        assert bundles.closed == ["a"]
        await live.close()
        assert sorted(bundles.closed) == ["a", "b", "c", "d"]

    run(test)


def test_a_shadow_that_is_too_slow_tries_fewer_texts_and_says_how_many_it_left_out():
    async def test(live: Live, bundles: Bundles) -> None:
        live.follow({"candidate": {"bundle": "b", "mode": "shadow"}})
        await settled(live)
        bundles.may_load.clear()
        for i in range(300):
            assert now(live, str(i)) == "a"
        assert live.figures()["candidate"]["not_shadowed"] == 300 - 256
        bundles.may_load.set()
        await asyncio.sleep(0.01)
        assert len(bundles.shadowed) == 256
        now(live, "later")
        await asyncio.sleep(0.01)
        assert bundles.shadowed[-1] == ["later"]

    run(test)


def test_a_replica_that_stops_finishes_the_bundle_that_was_about_to_leave():
    """What its audits found must not vanish with a closing that was cut off in its middle."""

    async def scenario() -> list[str]:
        bundles = Bundles()
        hangs = [True]

        async def close() -> None:
            if hangs.pop():
                hangs.append(False)
                await asyncio.Event().wait()
            bundles.closed.append("a")

        first = replace(bundles.served("a"), close=close)
        live = Live(first, bundles.load)
        live.follow({"bundle": "b"})
        async with asyncio.timeout(10):
            while hangs == [True]:
                await asyncio.sleep(0.01)
        await live.close()
        return bundles.closed

    assert sorted(asyncio.run(scenario())) == ["a", "b"]
