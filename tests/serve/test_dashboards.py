"""Dashboards and alerts name metrics that there are, and fields and panels that Grafana knows."""

import dataclasses
import json
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import prometheus, units
from grafana_foundation_sdk.models.dashboard import Dashboard
from pydantic import ConfigDict, TypeAdapter, ValidationError

from journeyman.labels.replica import Counts
from journeyman.recipe import Price
from journeyman.student import gauges
from serve.metrics import Measured

FOLDER = Path(__file__).parents[2] / "serve" / "dashboards"
DASHBOARDS = sorted(FOLDER.glob("*.json"))
_NAME = re.compile(r"ray_journeyman_\w+")


@pytest.fixture(scope="module")
def exported() -> set[str]:
    """As Ray exports what the code defines: counters as _total, histograms as _bucket."""
    names = {f"label_{field.name}_total" for field in dataclasses.fields(Counts)}
    source = (Path(__file__).parents[2] / "platform/journeyman/labels/progress.py").read_text()
    shown = re.search(r'for name in \(("rows_per_s".*?)\)', source, re.DOTALL)
    assert shown
    names |= {f"label_{name}" for name in re.findall(r'"(\w+)"', shown[1])}
    measured = Measured(None, None, "b", Price(), None)  # type: ignore[arg-type]
    for value in [*vars(measured).values(), *measured._gauges.values()]:
        info = getattr(value, "info", None)
        if info:
            suffix = {"Counter": "_total", "Histogram": "_bucket"}.get(type(value).__name__, "")
            names.add(info["name"].removeprefix("journeyman_") + suffix)
    return {f"ray_journeyman_{name}" for name in names} | {f"ray_{name}" for name in gauges.NAMES}


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_asks_for_metrics_that_are_exported(path: Path, exported: set[str]):
    board = json.loads(path.read_text())
    asked = {name for panel in board["panels"] for target in panel["targets"]
             for name in _NAME.findall(target["expr"])}  # fmt: skip
    asked |= {n for v in board["templating"]["list"] for n in _NAME.findall(v.get("query", ""))}
    assert asked and asked <= exported, asked - exported


def test_every_figure_of_a_training_is_on_its_dashboard():
    assert set(_NAME.findall((FOLDER / "training.json").read_text())) == {
        f"ray_{name}" for name in gauges.NAMES
    }


def parsed(board: dict[str, Any]) -> Dashboard:
    """By the types that Grafana generates from its own schema."""
    plugins.register_default_plugins()  # or options of panels and queries are parsed as anything
    return Dashboard.from_json(board)


def lost(told: Any, kept: Any, place: str) -> Iterator[str]:
    """Where the second lacks what the first says; it may say more, such as defaults."""
    if isinstance(told, dict) and isinstance(kept, dict):
        for name, value in told.items():
            if name in kept:
                yield from lost(value, kept[name], f"{place}.{name}")
            else:
                yield f"{place}.{name}: unknown"
    elif isinstance(told, list) and isinstance(kept, list) and len(told) == len(kept):
        for i, (one, other) in enumerate(zip(told, kept, strict=True)):
            yield from lost(one, other, f"{place}[{i}]")
    elif told != kept:
        yield f"{place}: {told!r} became {kept!r}"


def misfits(value: Any, place: str) -> Iterator[str]:
    """Where what was parsed is not of the type that the schema declares."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from misfits(item, f"{place}[{i}]")
    if not hasattr(value, "to_json"):
        return
    for name, declared in typing.get_type_hints(type(value)).items():
        found = getattr(value, name)
        adapter = TypeAdapter(declared, config=ConfigDict(arbitrary_types_allowed=True))
        try:
            fits = adapter.validate_python(found) == found  # pydantic would take "2" for a number
        except ValidationError:
            fits = False
        if not fits:
            yield f"{place}.{name}: {found!r}"
        yield from misfits(found, f"{place}.{name}")


def faults(board: dict[str, Any]) -> list[str]:
    """What of a dashboard Grafana would pass over, or not understand."""
    read = parsed(board)
    kept = json.loads(json.dumps(read, cls=JSONEncoder))
    return [*lost(board, kept, "dashboard"), *misfits(read, "dashboard")]


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_grafana_knows_every_field_of_a_dashboard(path: Path):
    board = json.loads(path.read_text())
    assert faults(board) == []
    known = {value for value in vars(units).values() if isinstance(value, str)}
    for panel in parsed(board).panels:
        assert all(isinstance(query, prometheus.Dataquery) for query in panel.targets)
        assert panel.field_config.defaults.unit in known


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        ("colour", "red", "dashboard.colour: unknown"),
        ("panels.0.gridPos.width", 8, "dashboard.panels[0].gridPos.width: unknown"),
        ("panels.0.gridPos.w", "8", "dashboard.panels[0].grid_pos.w: '8'"),
        ("panels.0.targets.0.query", "up", "dashboard.panels[0].targets[0].query: unknown"),
        (
            "panels.0.options.legend.placement",
            "below",
            "dashboard.panels[0].options.legend.placement: 'below'",
        ),
        ("templating.list.1.refresh", 7, "dashboard.templating.list_val[1].refresh: 7"),
    ],
)
def test_what_grafana_does_not_know_is_found(place: str, value: object, fault: str):
    board = json.loads((FOLDER / "training.json").read_text())
    *way, last = place.split(".")
    inner: Any = board
    for step in way:
        inner = inner[int(step) if step.isdigit() else step]
    inner[last] = value
    assert faults(board) == [fault]


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
