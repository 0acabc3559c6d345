"""What is dear: a cascade of tiny models that runs in Ray."""

from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest

from tests.serve import tiny
from tests.serve.several import Several, write


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> tiny.Run:
    """A run's folder with teacher, student and bundle."""
    return tiny.write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="session")
def several(run: tiny.Run) -> Several:
    """A bundle of two students in turn."""
    return write(run)


@dataclass(frozen=True)
class Running:
    """A cascade that is up."""

    run: tiny.Run
    url: str
    client: httpx.Client

    def classify(self, texts: object, **fields: object) -> httpx.Response:
        return self.client.post("/v1/classify", json={"input": texts, **fields})

    def results(self, texts: object, **fields: object) -> list[dict]:
        response = self.classify(texts, **fields)
        assert response.status_code == 200, response.text
        return response.json()["results"]


@pytest.fixture(scope="package")
def cascade(ray_cluster: None, run: tiny.Run) -> Iterator[Running]:
    from serve.running import running

    with running(run.bundle_dir) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield Running(run, url, client)
