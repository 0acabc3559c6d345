"""Dashboards and alerts name metrics that there are, and panels that Grafana can place."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from journeyman.labels.replica import Counts
from journeyman.recipe import Price
from serve.metrics import Measured

FOLDER = Path(__file__).parents[2] / "serve" / "dashboards"
DASHBOARDS = sorted(FOLDER.glob("*.json"))
_NAME = re.compile(r"ray_journeyman_\w+")


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """As Ray exports what the code defines: counters as _total, histograms as _bucket."""
    names = {f"label_{field.name}_total" for field in dataclasses.fields(Counts)}
    source = (Path(__file__).parents[2] / "platform/journeyman/labels/progress.py").read_text()
    gauges = re.search(r'for name in \(("rows_per_s".*?)\)', source, re.DOTALL)
    assert gauges
    names |= {f"label_{name}" for name in re.findall(r'"(\w+)"', gauges[1])}
    measured = Measured(None, None, "b", Price(), None)  # type: ignore[arg-type]
    for value in [*vars(measured).values(), *measured._gauges.values()]:
        info = getattr(value, "info", None)
        if info:
            suffix = {"Counter": "_total", "Histogram": "_bucket"}.get(type(value).__name__, "")
            names.add(info["name"].removeprefix("journeyman_") + suffix)
    return {f"ray_journeyman_{name}" for name in names}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_for_metrics_that_are_exported(path: Path, exported: set[str]):
    board = json.loads(path.read_text())
    asked = {name for panel in board["panels"] for target in panel["targets"]
             for name in _NAME.findall(target["expr"])}  # fmt: skip
    asked |= {n for v in board["templating"]["list"] for n in _NAME.findall(v.get("query", ""))}
    assert asked and asked <= exported, asked - exported


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_have_titles_and_places_of_their_own(path: Path):
    panels = json.loads(path.read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["targets"] for panel in panels)


def test_alerts_ask_for_metrics_that_are_exported_and_say_what_to_do(exported: set[str]):
    groups = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 6
    for rule in rules:
        asked = set(_NAME.findall(rule["expr"]))
        assert asked and asked <= exported, (rule["alert"], asked - exported)
        assert rule["annotations"]["action"] and rule["labels"]["severity"] in ("page", "ticket")
