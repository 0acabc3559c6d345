"""Who may ask, and how often: API keys by their hashes, and a token bucket for each.

A file of keys has a line for each: ``NAME sha256:HEX`` and, where it is limited, ``N/min`` and
``$D/day``. The keys themselves are in no file of ours.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from journeyman.errors import RecipeError

_LINE = re.compile(
    r"(?P<name>\S+)\s+sha256:(?P<hash>[0-9a-f]{64})(\s+(?P<limit>[1-9]\d*)/min)?"
    r"(\s+\$(?P<dollars>\d+(\.\d+)?)/day)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """per_minute: requests a minute, in bursts of at most as many; dollars_per_day: of the teacher,
    a day in UTC. None without a limit."""

    name: str
    sha256: str
    per_minute: int | None
    dollars_per_day: float | None = None


def new_key() -> str:
    """256 random bits, so that a plain hash of it cannot be searched."""
    return f"jm-{secrets.token_urlsafe(32)}"


def line_of(
    name: str, key: str, per_minute: int | None, dollars_per_day: float | None = None
) -> str:
    limit = f" {per_minute}/min" if per_minute else ""
    if dollars_per_day is not None:
        limit += f" ${dollars_per_day:.12g}/day"
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}{limit}"


def alone(key: str) -> tuple[Key, ...]:
    """Who has this key may ask, without a limit, and nobody else."""
    return (Key(name="alone", sha256=hashlib.sha256(key.encode()).hexdigest(), per_minute=None),)


def read(path: Path) -> tuple[Key, ...]:
    """Raises RecipeError, which never quotes a line: someone may have put a key itself there."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the file of API keys cannot be read ({error}).") from error
    keys: list[Key] = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if not found:
            raise RecipeError(
                f"{path}, line {number}: not NAME sha256:HEX [N/min] [$D/day]; `journeyman "
                "cascade key NAME` makes such lines."
            )
        limit, dollars = found["limit"], found["dollars"]
        keys.append(
            Key(
                name=found["name"],
                sha256=found["hash"],
                per_minute=int(limit) if limit else None,
                dollars_per_day=float(dollars) if dollars else None,
            )
        )
    if not keys:
        raise RecipeError(f"{path}: no API key in it, so nobody could ask; add one.")
    return tuple(keys)


class Keyring:
    """Knows keys and remembers how often each was used, at one of several replicas."""

    def __init__(self, keys: tuple[Key, ...], clock: Callable[[], float]) -> None:
        self._keys = keys
        self._buckets = {k.sha256: Bucket(k.per_minute, clock) for k in keys if k.per_minute}

    def find(self, presented: str) -> Key | None:
        """Compares with all keys, each in constant time."""
        digest = hashlib.sha256(presented.encode()).hexdigest()
        matching = [key for key in self._keys if hmac.compare_digest(key.sha256, digest)]
        return matching[0] if matching else None

    def wait_s(self, key: Key) -> float:
        """Takes one request from the key's bucket and returns 0, or the seconds until there is
        one to take."""
        bucket = self._buckets.get(key.sha256)
        return bucket.take() if bucket else 0.0

    def share(self, n_replicas: int) -> None:
        """From now on this one lets through its part: requests go to each about as often."""
        for bucket in self._buckets.values():
            bucket.share(n_replicas)


class Bucket:
    """A token bucket that holds a minute's worth, at least one."""

    def __init__(self, per_minute: int, clock: Callable[[], float]) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._n_sharing = 1
        self._level, self._at = self._size, clock()

    @property
    def _size(self) -> float:
        return max(1.0, self._per_minute / self._n_sharing)

    @property
    def _rate(self) -> float:
        return self._per_minute / 60 / self._n_sharing

    def share(self, n_sharing: int) -> None:
        """One of so many buckets that hold a minute's worth together."""
        if n_sharing != self._n_sharing:
            self._fill()
            self._level *= self._n_sharing / n_sharing
            self._n_sharing = n_sharing

    def take(self) -> float:
        """0, or the seconds to wait."""
        self._fill()
        if self._level < 1:
            return (1 - self._level) / self._rate
        self._level -= 1
        return 0.0

    def _fill(self) -> None:
        now = self._clock()
        self._level = min(self._size, self._level + (now - self._at) * self._rate)
        self._at = now
