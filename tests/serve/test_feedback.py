"""Where an ingress keeps feedback, and how soon."""

from pathlib import Path

import pytest

from journeyman.recipe import Feedback
from serve.ingress import _journal


@pytest.mark.parametrize(
    ("where", "roll_s", "rolled_after_s"),
    [("memory://{}", None, 60), ("{}", None, 300), ("memory://{}", 7, 7), ("{}", 7, 7)],
)
def test_rows_for_a_store_lie_on_their_node_for_a_minute_at_most(
    where: str,
    roll_s: float | None,
    rolled_after_s: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    journal = _journal(Feedback(to=where.format(tmp_path), roll_s=roll_s))
    journal.close()
    assert journal._roll_s == rolled_after_s
