"""Where ``--from-feedback`` ends: the new bundle beside the one that answers, and the way on."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from journeyman import files
from journeyman.errors import BundleMismatch, ClusterError, DataError, RecipeError

if TYPE_CHECKING:
    from journeyman.certify.bundle import Bundle
    from journeyman.run_folder import RunFolder

_USUAL = Path("serve/cascade.yaml")
_SHADOW, _PROMOTE = "shadow.yaml", "promote.yaml"
_DEPLOY_S = 300.0  # `serve deploy` returns before anything has started


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shadow", metavar="FILE", type=Path,
        help="with --from-feedback: the Serve config that the cascade was deployed by (default "
        f"{_USUAL}); out of it come {_SHADOW}, which has the new bundle decide beside the one that "
        f"answers, and {_PROMOTE}, by which it answers",
    )  # fmt: skip
    parser.add_argument(
        "--deploy", action="store_true",
        help=f"with --from-feedback: `serve deploy` {_SHADOW} (to RAY_DASHBOARD_ADDRESS)",
    )  # fmt: skip


def check(options: argparse.Namespace, run: RunFolder) -> None:
    """Before a run begins; raises RecipeError, and DataError where it would write over the bundle
    that answers."""
    if options.from_feedback is None:
        if options.shadow or options.deploy:
            flag = "--shadow" if options.shadow else "--deploy"
            raise RecipeError(f"{flag} goes with --from-feedback.")
        return
    from journeyman.cascade import rollout

    config = options.shadow or _USUAL
    if options.shadow is None and not config.is_file():
        return
    answering = rollout.present(_read(config))
    if any(_same(bundle, _bundle_of(run)) for bundle in answering):
        name = run.recipe.name.removesuffix("-feedback")
        raise DataError(
            f"{config}: {_bundle_of(run)} answers, and this run would write over it; give the run "
            f"another name: --set name={name}-2."
        )


def end(options: argparse.Namespace, run: RunFolder) -> None:
    """Write both configs beside the new bundle, deploy the first where asked to, and say what
    comes next. Without a word on where the cascade's config is, one that is not there is told."""
    from journeyman.certify import bundle as bundles

    new = bundles.load_any(run.path("certify"))
    if not new.served.feasible:
        print(f"shadow    not worth it: by the new bundle the teacher answers all. "
              f"{new.served.reason}")  # fmt: skip
        return
    try:
        present, shadow, promote = _write(
            options.shadow or _USUAL, run, new, is_named=options.shadow is not None
        )
    except DataError as error:
        if options.shadow or options.deploy:
            raise
        print(f"shadow    not yet: name the cascade's own config, --shadow FILE ({error})")
        return
    if options.deploy:
        _deploy(shadow)
        print(f"shadow    deployed {shadow}: {present} answers, the new bundle decides beside it")
    else:
        print(f"shadow    serve deploy {shadow}      {present} answers, the new bundle decides")
    print("look      journeyman cascade status      how much its student would answer")
    print(f"promote   serve deploy {promote}")


def _write(config: Path, run: RunFolder, new: Bundle, *, is_named: bool) -> tuple[str, Path, Path]:
    """The bundle that answers, and the files that are written; raises DataError.

    is_named: the user says that this is the cascade's config.
    """
    from journeyman.cascade import fitting, rollout
    from journeyman.certify import bundle as bundles
    from journeyman.certify.bundle_recipe import recipe_of

    def fits(present: str) -> bool:
        try:
            there, by = bundles.load_any(present), recipe_of(Path(present))
        except (BundleMismatch, RecipeError):  # the cluster refuses by itself what does not fit
            return is_named
        asked = recipe_of(run.path("certify"))
        return not (fitting.differing(there, new) or fitting.asked_otherwise(by, asked))

    content = _read(config)
    try:
        planned = rollout.plan(content, _bundle_of(run), fits)
    except DataError as error:
        raise DataError(f"{config}: {error}") from error
    paths = [run.directory / name for name in (_SHADOW, _PROMOTE)]
    for path, content in zip(paths, (planned.shadow, planned.promote), strict=True):
        head = f"# {config} with other bundles, by journeyman: serve deploy {path}\n"
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        files.write_bytes(path, (head + text).encode())
    return planned.present, paths[0], paths[1]


def _read(config: Path) -> dict[str, Any]:
    """Raises DataError."""
    try:
        content = yaml.safe_load(config.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{config}: cannot be read ({str(error).splitlines()[0]}).") from error
    applications = content.get("applications") if isinstance(content, dict) else None
    if not isinstance(applications, list) or not all(isinstance(a, dict) for a in applications):
        raise DataError(
            f"{config}: no config of Ray Serve, which has a list of `applications` (on Kubernetes "
            "it is the text in serveConfigV2)."
        )
    return content


def _bundle_of(run: RunFolder) -> str:
    """As every node of a cluster finds it."""
    return run.mirror("certify").url or str(run.path("certify").resolve())


def _same(bundle: str, other: str) -> bool:
    return bundle.rstrip("/") == other or str(Path(bundle).resolve()) == other


def _deploy(config: Path) -> None:
    """Raises ClusterError."""
    command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(config)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_DEPLOY_S
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"serve deploy {config}: no answer in {_DEPLOY_S:g} s.") from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no reason given"]
        raise ClusterError(
            f"serve deploy {config}: {lines[-1]}; the bundle is certified, and the same command "
            "tries again (RAY_DASHBOARD_ADDRESS names the cluster)."
        )
