"""A cluster of two nodes that jobs are submitted to."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import ray_head
from tests.chaos.labeling import nothing_but_a_name
from tests.ray_head import Head

CACHED = "someone/tiny-teacher"  # in the hub's cache of the head alone


@pytest.fixture(scope="session")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    folder = tmp_path_factory.mktemp("hub")
    cached = folder / "head" / "hub" / f"models--{CACHED.replace('/', '--')}"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    nothing_but_a_name(cached / "snapshots" / ("0" * 40))
    hub = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "head")}
    with ray_head.cluster(1, [{"HF_HOME": str(Path(folder / "worker"))}], **hub) as started:
        yield started
