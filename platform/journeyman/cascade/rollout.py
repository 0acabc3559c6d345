"""A new bundle on its way into a cascade that runs: Serve configs of the kind that `serve deploy`
takes, one to try it and one to let it answer. Writes and deploys none of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from journeyman.errors import DataError

_BUILDER = "serve.app:app"
_INGRESS = "Cascade"  # the deployment that takes up a bundle while it runs (serve/live.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """Whole Serve configs, which change nothing but the bundles of one cascade.

    Attributes:
        present: the bundle that answers, as the config names it.
        shadow: it goes on, and the new one decides on the same texts.
        promote: the new one answers.
    """

    present: str
    shadow: dict[str, Any]
    promote: dict[str, Any]


def plan(config: Mapping[str, Any], new: str, fits: Callable[[str], bool]) -> Rollout:
    """Take a new bundle up in the config that a cascade was deployed by.

    Args:
        config: as Serve takes it, with its list of `applications`.
        new: the bundle, as every node of the cluster finds it.
        fits: whether the new bundle can stand beside this one. A file may have several cascades.

    Raises DataError where there is not just one cascade that the bundle is for.
    """
    there = {place: bundle for place, bundle in _cascades(config).items() if fits(bundle)}
    if len(there) != 1:
        raise DataError(
            f"{len(there)} of its applications are cascades ({_BUILDER}) with a bundle of the same "
            "teacher, prompt and labels as the new one; there must be one."
        )
    [(place, present)] = there.items()
    return Rollout(
        present=present,
        shadow=_with(config, place, {"bundle": present, "candidate": {"bundle": new}}),
        promote=_with(config, place, {"bundle": new}),
    )


def present(config: Mapping[str, Any]) -> list[str]:
    """The bundles that the cascades of a config answer by."""
    return list(_cascades(config).values())


def _cascades(config: Mapping[str, Any]) -> dict[int, str]:
    """Of each application of ours, by its place: the bundle that it answers by."""
    found = {
        place: _user_config(application).get("bundle")
        or (application.get("args") or {}).get("bundle")
        for place, application in enumerate(config["applications"])
        if application.get("import_path") == _BUILDER
    }
    return {place: bundle for place, bundle in found.items() if bundle}


def _with(config: Mapping[str, Any], place: int, user_config: dict[str, Any]) -> dict[str, Any]:
    changed = copy.deepcopy(dict(config))
    deployments = changed["applications"][place].setdefault("deployments", [])
    ours = [one for one in deployments if one.get("name") == _INGRESS]
    if not ours:
        ours = [{"name": _INGRESS}]
        deployments.extend(ours)
    ours[0]["user_config"] = user_config
    return changed


def _user_config(application: Mapping[str, Any]) -> Mapping[str, Any]:
    for deployment in application.get("deployments") or ():
        if deployment.get("name") == _INGRESS:
            return deployment.get("user_config") or {}
    return {}
