"""An MLflow run, at MLFLOW_TRACKING_URI or in RUN/mlflow/."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Mapping
from typing import Any

from journeyman.student.trackers import Tracked

_TAG = "journeyman.run"


def start(tracked: Tracked) -> _Run:
    """The experiment of the recipe's name, and in it a new run or that with the same tag."""
    mlflow = importlib.import_module("mlflow")
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        folder = tracked.folder / "mlflow"
        folder.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{folder}/mlflow.db"
    return _Run(mlflow.MlflowClient(tracking_uri=uri), tracked)


class _Run:
    def __init__(self, client: Any, tracked: Tracked) -> None:
        self._client = client
        experiment = client.get_experiment_by_name(tracked.name)
        number = experiment.experiment_id if experiment else self._new_experiment(tracked)
        found = client.search_runs([number], f"tags.`{_TAG}` = '{tracked.id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        run = client.create_run(number, tags={_TAG: tracked.id}, run_name=tracked.title)
        self._id = run.info.run_id
        for key, value in tracked.settings.items():
            client.log_param(self._id, key, value)

    def _new_experiment(self, tracked: Tracked) -> str:
        kept: str | None = None
        if not os.environ.get("MLFLOW_TRACKING_URI"):
            kept = (tracked.folder / "mlflow" / "artifacts").as_uri()
        number: str = self._client.create_experiment(tracked.name, artifact_location=kept)
        return number

    def log(self, step: int, values: Mapping[str, float]) -> None:
        entities = importlib.import_module("mlflow.entities")
        now = int(time.time() * 1000)
        metrics = [entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "FAILED")
