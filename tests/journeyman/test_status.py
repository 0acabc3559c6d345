"""What `journeyman cascade status` says of a cascade that runs."""

from journeyman.cli import cascade


def test_figures_of_a_cascade_of_before_are_told():
    watch = {"audits": 12, "pending": 3, "lost": 1, "left_out": 0, "not_drawn": 0, "judged": 0,
             "rung": 0}  # fmt: skip
    assert cascade._audits(watch).startswith("12, 3 pending, 1 lost")
    assert "2 left out" in cascade._audits({**watch, "stopped": 2})
