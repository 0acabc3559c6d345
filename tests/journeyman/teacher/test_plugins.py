"""What vLLM finds of ours where journeyman is a folder on PYTHONPATH, and no installed package."""

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

from journeyman.teacher import plugins
from tests.conftest import ROOT

FOUND = """
import importlib.metadata, subprocess, sys
from journeyman.teacher import plugins

def found():
    return sorted(p.name for p in importlib.metadata.entry_points(group=plugins.GROUP)
                  if p.value.startswith("journeyman."))

if sys.argv[1:]:
    print(found(), [p.load().__name__ for p in importlib.metadata.entry_points(group=plugins.GROUP)
                    if p.value.startswith("journeyman.")])
else:
    print(found())
    plugins.announce()
    plugins.announce()
    print(found(), flush=True)
    subprocess.run([sys.executable, "-S", __file__, "child"], check=True)
"""


def test_they_are_those_of_an_installed_journeyman():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][plugins.GROUP] == plugins.PLUGINS


def test_an_engines_processes_find_them_without_an_installation(tmp_path: Path):
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(("journeyman", "__editable__")):
            (packages / entry.name).symlink_to(entry)
    script = tmp_path / "found.py"
    script.write_text(FOUND)
    environment = os.environ | {
        "PYTHONPATH": f"{packages}{os.pathsep}{ROOT / 'platform'}",
        "JOURNEYMAN_CACHE": str(tmp_path / "cache"),
    }
    told = subprocess.run(
        [sys.executable, "-S", str(script)], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    before, after, child = told.stdout.splitlines()
    assert before == "[]"
    names = sorted(plugins.PLUGINS)
    assert after == str(names)
    assert child.startswith(str(names))
    assert all(f in child for f in ("follow", "begin_together", "sleep_while_waiting"))
