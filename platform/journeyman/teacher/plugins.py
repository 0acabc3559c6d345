"""What vLLM loads of ours in each of its processes, told to it where nobody has installed us.

vLLM finds plugins by the entry points of installed distributions. A job brings our code as a folder
on PYTHONPATH, which has none: there a folder with nothing but that information is made, and put on
the path of this process and of those that it starts.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

from journeyman import files

GROUP = "vllm.general_plugins"
PLUGINS = {  # as in pyproject.toml
    "journeyman_lifeline": "journeyman.teacher.lifeline:follow",
    "journeyman_siblings": "journeyman.teacher.siblings:begin_together",
    "journeyman_waiting": "journeyman.teacher.waiting:sleep_while_waiting",
}


def announce() -> None:
    """Before an engine starts; raises DataError where the cache's disk cannot be written."""
    known = {point.value for point in importlib.metadata.entry_points(group=GROUP)}
    if known >= set(PLUGINS.values()):
        return
    folder = str(_folder())
    sys.path.append(folder)
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{path}{os.pathsep}{folder}" if path else folder
    importlib.invalidate_caches()


def _folder() -> Path:
    points = "\n".join(f"{name} = {value}" for name, value in PLUGINS.items())
    told = f"[{GROUP}]\n{points}\n"
    folder = files.cache() / "plugins" / hashlib.sha256(told.encode()).hexdigest()[:16]
    about = folder / "journeyman_plugins-0.dist-info"
    files.write_bytes(about / "METADATA", b"Metadata-Version: 2.1\nName: journeyman-plugins\n")
    files.write_bytes(about / "entry_points.txt", told.encode())
    return folder
