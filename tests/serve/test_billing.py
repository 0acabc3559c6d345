"""What keys have spent, settled by all replicas of a cascade in one ledger a day. No Ray."""

import asyncio
import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from journeyman.cascade.budgets import Lent, Purse
from journeyman.errors import DataError
from serve import billing
from serve.agreement import Agreement
from serve.billing import Bill, Settling

TODAY = datetime.now(UTC).date().isoformat()


def bill(
    to: Path,
    number: int,
    dollars: float,
    replica: str = "a",
    holds: float | None = None,
    leaves: bool = False,
) -> Bill:
    return Bill(
        replica=replica,
        number=number,
        spent={"k": dollars},
        holds={} if holds is None else {"k": holds},
        limits={"k": 10.0},
        state=str(to),
        leaves=leaves,
    )


def lent(shared: Agreement, *bills: Bill) -> Lent:
    """By the last of them."""

    async def all_of_them() -> Lent:
        for one in bills:
            last = await shared.settle(one)
        return last

    return asyncio.run(all_of_them())


def lease(shared: Agreement, *bills: Bill) -> float:
    return lent(shared, *bills).leases["k"]


def spent(to: Path) -> float:
    """As the one ledger there says."""
    [ledger] = (to / "budgets").glob("*.json")
    return json.loads(ledger.read_text())["spent"]["k"]


def test_what_a_key_spends_is_kept_once_over_replicas_and_restarts(tmp_path: Path):
    shared = Agreement(30.0)
    assert lease(shared, bill(tmp_path, 1, 2.0), bill(tmp_path, 1, 2.0)) == 4.0, "half of 8"
    assert lease(shared, bill(tmp_path, 1, 3.0, "b")) == pytest.approx(1 / 3), "5, of which a has 4"
    assert lease(shared, bill(tmp_path, 2, 1.0)) == pytest.approx((4 - 1 / 3) / 3)
    assert lease(Agreement(30.0), bill(tmp_path, 1, 0.0, "c")) == 2.0
    used_up = lent(Agreement(30.0), bill(tmp_path, 1, 99.0, "d"))
    assert used_up.leases == {"k": 0.0} and used_up.used_up == {"k"}
    assert spent(tmp_path) == 105.0


def test_a_replica_that_starts_may_spend_at_once_whatever_became_of_those_before_it(tmp_path: Path):
    """A lost one's lease is not free for a minute."""
    shared, held = Agreement(30.0), 0.0
    for number in range(8):
        got = lent(shared, bill(tmp_path, 1, 0.0, f"{number}"))
        assert got.leases["k"] > 0 and not got.used_up
        held += got.leases["k"]
    assert held < 10.0


def test_a_replica_that_stops_gives_back_its_lease_and_what_it_spent_counts_once(tmp_path: Path):
    shared = Agreement(30.0)
    before = lease(shared, bill(tmp_path, 1, 0.0))
    last = bill(tmp_path, 3, 1.0, leaves=True)
    assert lent(shared, last, last).leases == {}
    late = bill(tmp_path, 2, 1.0)  # overtaken by it
    assert lent(shared, late).leases == {}
    assert before == 5.0 and lease(shared, bill(tmp_path, 1, 0.0, "b")) == 4.5
    assert spent(tmp_path) == 1.0


def test_what_a_replica_could_tell_nobody_as_it_stopped_counts_in_the_next_ledger(tmp_path: Path):
    """As where all of Serve stops at once."""
    shared, purse = Agreement(30.0), Purse({"k": 10.0})
    gone = False

    async def ask(one: Bill) -> Lent:
        if gone:
            raise TimeoutError
        return await shared.settle(one)

    async def scenario() -> None:
        nonlocal gone
        settling = Settling(purse=purse, replica="a", state=str(tmp_path), ask=ask)
        settling.start()
        while not purse.may_pay("k"):
            await asyncio.sleep(0.01)
        purse.pay("k", 3.0)
        gone = True
        await settling.leave()

    asyncio.run(scenario())
    for _ in range(2):  # once
        assert lease(Agreement(30.0), bill(tmp_path, 1, 0.0, "b")) == 3.5
    assert spent(tmp_path) == 3.0


def test_an_agreement_that_begins_anew_promises_nothing_that_others_still_hold(tmp_path: Path):
    first = Agreement(30.0)
    a = lease(first, bill(tmp_path, 1, 0.0, "a"))
    b = lease(first, bill(tmp_path, 1, 0.0, "b"))
    a = lease(first, bill(tmp_path, 2, 2.0, "a"))
    assert 0 < a + b <= 8.0
    anew = Agreement(30.0)
    a = lease(anew, bill(tmp_path, 3, 1.0, "a", holds=a))
    assert a + b <= 7.0, "b is not heard of yet"
    b = lease(anew, bill(tmp_path, 3, 0.0, "b", holds=b))
    assert a + b <= 7.0
    again = lease(anew, bill(tmp_path, 4, 0.0, "a", holds=a))
    assert 0 < again <= 7.0 - b


def test_a_damaged_ledger_is_said_and_pays_for_nothing(tmp_path: Path):
    lent(Agreement(30.0), bill(tmp_path, 1, 2.0))
    [ledger] = (tmp_path / "budgets").iterdir()
    ledger.write_text("{")
    with pytest.raises(DataError, match=r"damaged.*delete it"):
        lent(Agreement(30.0), bill(tmp_path, 1, 1.0))


def test_replicas_together_spend_no_more_than_the_budget_and_what_was_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(billing, "EVERY_S", 0.01)
    shared, purses, paid = Agreement(30.0), [Purse({"k": 10.0}) for _ in range(3)], [0.0]

    async def flaky(one: Bill) -> Lent:
        got = await shared.settle(one)
        if one.number % 3 == 0 and len(failed) < 20:
            failed.append(one.number)
            raise TimeoutError  # heard, and the answer lost
        return got

    async def serve(purse: Purse) -> None:
        while True:
            await asyncio.sleep(0.001)
            if purse.may_pay("k"):
                purse.pay("k", 0.05)
                paid[0] += 0.05

    async def scenario() -> None:
        settling = [
            Settling(purse=purse, replica=str(i), state=str(tmp_path), ask=flaky)
            for i, purse in enumerate(purses)
        ]
        for one in settling:
            one.start()
        tasks = [asyncio.create_task(serve(purse)) for purse in purses]
        async with asyncio.timeout(20):
            while not all(p.is_used_up("k", TODAY) and not p.bill() for p in purses):
                await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()
        for one in settling:
            await one.leave()

    failed: list[int] = []
    asyncio.run(scenario())
    assert failed
    assert 10.0 <= paid[0] <= 10.0 + 3 * 0.05 + 1e-9
    assert spent(tmp_path) == pytest.approx(paid[0])
