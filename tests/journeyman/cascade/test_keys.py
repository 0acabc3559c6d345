"""Who may ask, and how often."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from journeyman.cascade import keys
from journeyman.cascade.keys import Bucket, Keyring
from journeyman.errors import RecipeError


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "keys"
    path.write_text("# who may ask\n\n" + "\n".join(lines) + "\n")
    return path


def test_a_key_is_known_by_its_hash_alone(tmp_path: Path):
    shop, other = keys.new_key(), keys.new_key()
    path = written(tmp_path, keys.line_of("shop", shop, 60), keys.line_of("ops", other, None))
    assert shop not in path.read_text() and len(shop) > 40 and shop != other
    ring = Keyring(keys.read(path), Clock())
    found = ring.find(shop)
    assert found is not None and (found.name, found.per_minute) == ("shop", 60)
    assert ring.find(other).name == "ops"  # type: ignore[union-attr]
    for wrong in ("", "shop", shop[:-1], shop + "x", found.sha256):
        assert ring.find(wrong) is None


def test_a_limited_key_waits_until_the_next_request_is_free(tmp_path: Path):
    clock = Clock()
    shop = keys.new_key()
    ring = Keyring(keys.read(written(tmp_path, keys.line_of("shop", shop, 30))), clock)
    key = ring.find(shop)
    assert key is not None
    assert [ring.wait_s(key) for _ in range(30)] == [0.0] * 30
    assert ring.wait_s(key) == pytest.approx(2.0)
    clock.now += 2.0
    assert ring.wait_s(key) == 0.0 and ring.wait_s(key) > 0


def test_a_bucket_lets_its_rate_through_and_no_more():
    clock = Clock()
    bucket, let_through = Bucket(120, clock), 0
    for _ in range(10_000):  # 100 seconds
        clock.now += 0.01
        let_through += bucket.take() == 0.0
    assert let_through == pytest.approx(120 + 100 * 2, abs=1)


def test_a_key_without_a_limit_never_waits(tmp_path: Path):
    key = keys.new_key()
    ring = Keyring(keys.read(written(tmp_path, keys.line_of("ops", key, None))), Clock())
    assert {ring.wait_s(ring.find(key)) for _ in range(1000)} == {0.0}  # type: ignore[arg-type]


def test_replicas_let_through_no_more_than_the_limit_together(tmp_path: Path):
    shop = keys.new_key()
    [key] = keys.read(written(tmp_path, keys.line_of("shop", shop, 60)))
    clock = Clock()
    rings = [Keyring((key,), clock) for _ in range(3)]
    for ring in rings:
        ring.share(3)

    def let_through(rings: list[Keyring]) -> int:
        return sum(ring.wait_s(key) == 0 for ring in rings for _ in range(100))

    assert let_through(rings) == 60
    clock.now += 30
    assert let_through(rings) == 30
    rings[0].share(1)  # the others have gone: one second's request is its own now
    clock.now += 2
    assert let_through(rings[:1]) == 2
    seldom = Keyring((replace(key, per_minute=1),), clock)
    seldom.share(4)
    assert let_through([seldom]) == 0
    clock.now += 180  # a quarter was there, the rest comes at a quarter of the rate
    assert let_through([seldom]) == 1 and seldom.wait_s(key) == 240


def test_a_line_that_is_none_is_named_by_its_number_and_never_quoted(tmp_path: Path):
    secret = keys.new_key()
    path = written(tmp_path, f"shop {secret}")
    with pytest.raises(RecipeError, match=re.escape(f"{path}, line 3: not NAME sha256:HEX")) as e:
        keys.read(path)
    assert secret not in str(e.value)


@pytest.mark.parametrize("content", ["", "# nobody\n"])
def test_a_file_without_keys_is_refused_rather_than_letting_everyone_in(
    tmp_path: Path, content: str
):
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(RecipeError, match="no API key in it"):
        keys.read(path)
    with pytest.raises(RecipeError, match="cannot be read"):
        keys.read(tmp_path / "none")


def test_a_budget_is_read_and_written(tmp_path: Path):
    shop = keys.new_key()
    [key] = keys.read(written(tmp_path, keys.line_of("shop", shop, 60, 2.5)))
    assert (key.per_minute, key.dollars_per_day) == (60, 2.5)
    [key] = keys.read(written(tmp_path, keys.line_of("shop", shop, None, 0)))
    assert (key.per_minute, key.dollars_per_day) == (None, 0.0)
    with pytest.raises(RecipeError, match=r"line 3: not NAME sha256:HEX \[N/min\] \[\$D/day\]"):
        keys.read(written(tmp_path, keys.line_of("shop", shop, None) + " $-1/day"))
