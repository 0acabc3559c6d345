"""What happens on the nodes of a cluster, as lines of JSON that name the run and the shard.

In Ray's own log folder of each node, where its dashboard, ``ray logs`` and log collectors look:
``logs/journeyman/STEP-NAME.log``. No text of a row is ever in them.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

_FOLDER = "journeyman"
_MOST_BYTES, _KEPT = 50 << 20, 2  # of a file, and how many older ones stay


class Log:
    """The log of one process; where there is no Ray, what it is told goes nowhere."""

    def __init__(self, folder: Path | None, name: str, **fields: Any) -> None:
        """fields: said in every line. A folder that cannot be written to is no reason to stop."""
        self._fields = fields
        self._logger = logging.Logger(f"{__name__}.{name}", logging.INFO)
        self._logger.addHandler(logging.NullHandler())  # or errors would go to stderr
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handler = RotatingFileHandler(
                folder / f"{name}.log", maxBytes=_MOST_BYTES, backupCount=_KEPT, delay=True
            )
        except OSError:
            return
        handler.setFormatter(_Line())
        self._logger.addHandler(handler)

    @classmethod
    def of_ray(cls, name: str, **fields: Any) -> Log:
        """In the log folder of this process's Ray node."""
        return cls(_folder_of_ray(), name, **fields)

    def info(self, event: str, **fields: Any) -> None:
        self._logger.info(event, extra={"fields": self._fields | fields})

    def error(self, event: str, **fields: Any) -> None:
        self._logger.error(event, extra={"fields": self._fields | fields})


class _Line(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        said = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "event": record.getMessage(),
        }
        return json.dumps(said | getattr(record, "fields", {}), ensure_ascii=False)


def _folder_of_ray() -> Path | None:
    """Ray (2.60) tells no one where its logs are; Serve finds them in the same way."""
    import ray

    node = getattr(ray._private.worker, "_global_node", None)
    return None if node is None else Path(node.get_logs_dir_path()) / _FOLDER
