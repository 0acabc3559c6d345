"""What the teacher did for requests that were given up: by their clients, or at their deadline; and
who pays for it, or nobody, as of audits.

Such a call has no answer that could say what it took. The replica that worked on it keeps that,
under the account that the call named, until the ingress that asked comes for it.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar
from dataclasses import dataclass

from journeyman.teacher.progress import Spent


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """ingress: the replica that asks; key: the API key's hash, None where nobody needs one, or
    where an audit asks: for those nobody pays, and they are counted apart."""

    ingress: str
    bundle: str
    key: str | None
    is_audit: bool = False


# Of the request or the audit that is being answered.
account: ContextVar[Account | None] = ContextVar("account", default=None)


class GivenUp:
    """Of one replica of the teacher, for all who ask it. Use it from any thread."""

    def __init__(self) -> None:
        self._spent: dict[Account, Spent] = {}
        self._lock = threading.Lock()

    def add(self, whose: Account | None, spent: Spent) -> None:
        if whose is None:
            return
        with self._lock:
            self._spent.setdefault(whose, Spent()).add(spent)

    def take(self, ingress: str) -> dict[Account, Spent]:
        """What this one has not heard of yet."""
        with self._lock:
            found = {one: spent for one, spent in self._spent.items() if one.ingress == ingress}
            for one in found:
                del self._spent[one]
        return found
