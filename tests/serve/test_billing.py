"""What keys have spent, settled by all replicas of a cascade in one ledger a day. No Ray."""

import asyncio
import json
from pathlib import Path

import pytest

from journeyman.cascade.budgets import Purse
from journeyman.errors import DataError
from serve import billing
from serve.agreement import Agreement
from serve.billing import Bill, settle


def bill(
    to: Path, number: int, dollars: float, replica: str = "a", holds: float | None = None
) -> Bill:
    return Bill(
        replica=replica,
        number=number,
        spent={"k": dollars},
        holds={} if holds is None else {"k": holds},
        limits={"k": 10.0},
        state=str(to),
    )


def settled(shared: Agreement, *bills: Bill) -> dict[str, float]:
    async def all_of_them() -> dict[str, float]:
        for one in bills:
            leases = await shared.settle(one)
        return leases

    return asyncio.run(all_of_them())


def test_what_a_key_spends_is_kept_once_over_replicas_and_restarts(tmp_path: Path):
    shared = Agreement(30.0)
    assert settled(shared, bill(tmp_path, 1, 2.0), bill(tmp_path, 1, 2.0)) == {"k": 8.0}
    assert settled(shared, bill(tmp_path, 1, 3.0, "b")) == {"k": 0.0}, "a holds what is left"
    assert settled(shared, bill(tmp_path, 2, 1.0)) == {"k": 2.0}, "and now a half of it"
    assert settled(shared, bill(tmp_path, 2, 0.0, "b")) == {"k": 1.0}
    assert settled(Agreement(30.0), bill(tmp_path, 1, 0.0, "c")) == {"k": 4.0}
    assert settled(Agreement(30.0), bill(tmp_path, 1, 99.0, "d")) == {"k": 0.0}
    [ledger] = (tmp_path / "budgets").iterdir()
    assert json.loads(ledger.read_text())["spent"] == {"k": 105.0}


def test_an_agreement_that_begins_anew_promises_nothing_that_others_still_hold(tmp_path: Path):
    first = Agreement(30.0)
    a = settled(first, bill(tmp_path, 1, 0.0, "a"))["k"]
    assert a == 10.0 and settled(first, bill(tmp_path, 1, 0.0, "b")) == {"k": 0.0}
    a = settled(first, bill(tmp_path, 2, 2.0, "a"))["k"]
    b = settled(first, bill(tmp_path, 2, 0.0, "b"))["k"]
    assert a + b <= 8.0
    anew = Agreement(30.0)
    a = settled(anew, bill(tmp_path, 3, 1.0, "a", holds=a))["k"]
    assert a + b <= 7.0, "b is not heard of yet"
    b = settled(anew, bill(tmp_path, 3, 0.0, "b", holds=b))["k"]
    assert a + b <= 7.0
    again = settled(anew, bill(tmp_path, 4, 0.0, "a", holds=a))["k"]
    assert 0 < again <= 7.0 - b


def test_a_damaged_ledger_is_said_and_pays_for_nothing(tmp_path: Path):
    settled(Agreement(30.0), bill(tmp_path, 1, 2.0))
    [ledger] = (tmp_path / "budgets").iterdir()
    ledger.write_text("{")
    with pytest.raises(DataError, match=r"damaged.*delete it"):
        settled(Agreement(30.0), bill(tmp_path, 1, 1.0))


def test_replicas_together_spend_no_more_than_the_budget_and_what_was_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(billing, "EVERY_S", 0.01)
    shared, purses, spent = Agreement(30.0), [Purse({"k": 10.0}) for _ in range(3)], [0.0]

    async def flaky(one: Bill) -> dict[str, float]:
        leases = await shared.settle(one)
        if one.number % 3 == 0 and len(failed) < 20:
            failed.append(one.number)
            raise TimeoutError  # heard, and the answer lost
        return leases

    async def serve(purse: Purse) -> None:
        while True:
            await asyncio.sleep(0.001)
            if purse.may_pay("k"):
                purse.pay("k", 0.05)
                spent[0] += 0.05

    async def scenario() -> None:
        work = [settle(p, str(i), str(tmp_path), flaky) for i, p in enumerate(purses)]
        tasks = [asyncio.create_task(one) for one in (*work, *map(serve, purses))]
        async with asyncio.timeout(20):
            while any(p.may_pay("k") or p.bill() or not p.has_settled for p in purses):
                await asyncio.sleep(0.02)
        for task in tasks:
            task.cancel()

    failed: list[int] = []
    asyncio.run(scenario())
    assert failed
    assert 10.0 <= spent[0] <= 10.0 + 3 * 0.05 + 1e-9
    [ledger] = (tmp_path / "budgets").iterdir()
    assert json.loads(ledger.read_text())["spent"]["k"] == pytest.approx(spent[0])
