"""``journeyman cascade``: what a running cascade says of itself, and the keys to ask it with."""

from __future__ import annotations

import argparse
import os
import re
from typing import Any

from journeyman.cascade import keys
from journeyman.cli.arguments import command, positive
from journeyman.cli.text import table
from journeyman.errors import ClusterError, RecipeError

_STATUS = """\
Whether a cascade is ready, what it promises, who answered in the last minute, and whether its
teacher holds. Who answered is counted over all replicas; what fails, and the stability of scores,
are those of the replica that answers.
"""
_STATUS_EXAMPLES = """\
examples:
  journeyman cascade status
  JOURNEYMAN_API_KEY=jm-... journeyman cascade status http://cascade.internal:8000
"""
_KEY = """\
Make an API key. The key itself goes to the terminal once, and is stored nowhere; the line with its
hash goes into the file that cascade.api_keys or JOURNEYMAN_API_KEYS names.
"""
_KEY_EXAMPLES = """\
examples:
  journeyman cascade key web-shop --per-minute 600 --dollars-per-day 25
"""


_FAILURES = (
    ("feedback_failure", "feedback cannot be stored and waits on its host"),
    ("agreement_failure", "this replica cannot reach the others and goes on alone"),
    ("reload_failure", "the bundle asked for does not answer"),
)


def add_commands(commands: Any) -> None:
    group = commands.add_parser("cascade", help="look after a running cascade: status, key")
    actions = group.add_subparsers(required=True, metavar="ACTION")
    status = command(
        actions, "status", "what a running cascade does", _status, _STATUS, _STATUS_EXAMPLES
    )
    status.add_argument(
        "url", metavar="URL", nargs="?", default="http://127.0.0.1:8000",
        help="where it answers (default http://127.0.0.1:8000)",
    )  # fmt: skip
    key = command(actions, "key", "make an API key", _key, _KEY, _KEY_EXAMPLES)
    key.add_argument("name", metavar="NAME", help="whose key it is, in one word")
    key.add_argument(
        "--per-minute", metavar="N", type=positive, help="at most so many requests a minute"
    )
    key.add_argument(
        "--dollars-per-day", metavar="D", type=_dollars,
        help="at most so much for the teacher's answers a day (UTC), at teacher.price",
    )  # fmt: skip


def _dollars(word: str) -> float:
    value = float(word)
    if not 0 <= value < float("inf"):
        raise ValueError(word)
    return value


def _key(options: argparse.Namespace) -> int:
    if not re.fullmatch(r"[^\s#]\S*", options.name):
        raise RecipeError(f"{options.name!r}: the name of a key is one word.")
    key = keys.new_key()
    print(f"key   {key}")
    line = keys.line_of(options.name, key, options.per_minute, options.dollars_per_day)
    print(f"line  {line}")
    return 0


def _status(options: argparse.Namespace) -> int:
    import httpx

    key = os.environ.get("JOURNEYMAN_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = options.url.rstrip("/")
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=10) as client:
            ready, bundle, figures = (
                client.get(path) for path in ("/readyz", "/v1/bundle", "/v1/figures")
            )
            for response in (bundle, figures):
                response.raise_for_status()
            rows = _rows(ready.json(), bundle.json(), figures.json())
    except httpx.HTTPStatusError as error:
        hint = ", set JOURNEYMAN_API_KEY" if error.response.status_code == 401 else ""
        raise ClusterError(
            f"{url}: answers with {error.response.status_code}, so it is no cascade of ours, or "
            f"it wants a key{hint}."
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        raise ClusterError(
            f"{url}: no cascade answers there ({type(error).__name__}); see `serve status`, or "
            "name its address: journeyman cascade status URL."
        ) from error
    print(table(rows))
    return 0 if ready.status_code == 200 else 1


def _rows(ready: dict[str, Any], bundle: dict[str, Any], figures: dict[str, Any]) -> list[Any]:
    served = next(g for g in bundle["guarantees"] if g["kind"] == bundle["served_guarantee"])
    rate = figures["escalation_rate"]
    return [
        ("state", ready.get("status") or ready["error"]["message"]),
        ("bundle", bundle["id"]),
        ("promise", f"{served['kind']} at most {served['alpha']:g}, "
                    f"confidence {1 - served['delta']:.0%}{_broken(figures)}"),
        ("threshold", _threshold(bundle)),
        ("last minute", _counts(figures["last_minute"])),
        ("since start", _counts(figures["totals"]) + _of_replicas(figures.get("replicas", 1))),
        *_by_stage(figures.get("by_stage")),
        ("escalated", "nothing was asked in the last minute" if rate is None else f"{rate:.1%}"),
        *_dollars_of(figures),
        ("waiting", f"{figures['waiting']} texts for the teacher, "
                    f"{figures.get('waiting_for_student', 0)} with the student"),
        ("breaker", "open: the teacher fails" if figures["breaker_open"] else "closed"),
        ("stability", _stability(figures["population_stability"])),
        ("audits", _audits(figures["watch"])),
        *_candidate(figures["candidate"]),
        *_feedback_lost(figures["feedback_lost"]),
        *(("failing", f"{what}: {figures[name]}") for name, what in _FAILURES if figures[name]),
    ]  # fmt: skip


def _of_replicas(n: int) -> str:
    return f", of the {n} replicas that run" if n > 1 else ""


def _broken(figures: dict[str, Any]) -> str:
    if figures.get("guarantee") != "tightened":
        return ""
    return ", as certified: audits found it broken, and nothing is promised until a new bundle is"


def _threshold(bundle: dict[str, Any]) -> str:
    if bundle["threshold"] is None:
        return "none: the teacher answers all"
    students = (bundle.get("stages") or {"students": [bundle]})["students"]
    return ", then ".join(
        "nothing" if one["threshold"] is None else f"{one['score']} above {one['threshold']:.4f}"
        for one in students
    )


def _by_stage(answered: dict[str, int] | None) -> list[tuple[str, str]]:
    """Of several students."""
    if not answered:
        return []
    return [("", "of these by student " + ", ".join(f"{i}: {n:,}" for i, n in answered.items()))]


def _dollars_of(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """Where the teacher's tokens have a price."""
    paid, audits = figures["teacher_dollars"], figures["audit_dollars"]
    if not paid + audits:
        return []
    said = [f"{paid:,.2f} for the teacher's answers"]
    said += [f"{audits:,.2f} for audits"] if audits else []
    return [("dollars", f"{', '.join(said)}, some {figures['saved_dollars']:,.2f} saved")]


def _feedback_lost(n_rows: int) -> list[tuple[str, str]]:
    return (
        [("lost", f"{n_rows:,} rows of feedback, for which its disk had no room")] if n_rows else []
    )


def _candidate(tried: dict[str, Any] | None) -> list[tuple[str, str]]:
    """Of a shadow its student's decisions are counted; of a canary, who answered."""
    if tried is None:
        return []
    shadows = tried["mode"] == "shadow"
    verb = "decides on" if shadows else "answers"
    left = f", {tried['not_shadowed']:,} left out" if tried["not_shadowed"] else ""
    lines = [
        ("candidate", f"{tried['bundle']}, a {tried['mode']}: it {verb} {tried['share']:.0%} of "
                      f"texts{left}"),
        ("  last minute", _decided(tried["last_minute"], shadows)),
        ("  since tried", _decided(tried["totals"], shadows)),
    ]  # fmt: skip
    if tried["unready"]:
        lines.append(("  left out", f"its student is away: {tried['unready']}"))
    if tried.get("guarantee") == "tightened":
        return [*lines, ("  guarantee", "audits found its promise broken: do not promote it")]
    return [*lines, ("  promote", "serve deploy promote.yaml, which is in its run's folder")]


def _decided(of: dict[str, int], shadows: bool) -> str:
    escalated = of["teacher"] + of["void"]
    n = of["student"] + escalated
    if not n:
        return "nothing yet"
    would = "would be " if shadows else ""
    return f"{escalated / n:.1%} of {n:,} texts {would}escalated"


def _stability(index: float | None) -> str:
    if index is None:
        return "too few texts to say"
    return f"{index:.2f}, population stability of scores (without drift mostly under .1)"


def _audits(watch: dict[str, Any] | None) -> str:
    if watch is None:
        return (
            "not watched: no cascade.feedback, or a promise against gold, or by a judge that is "
            "another model than the teacher"
        )
    of_them = {"lost (errors, for all anyone knows)": watch["lost"],
               "left out (the teacher cannot answer the text)": watch["left_out"],
               "not drawn (too many waited, or the watch could not be read)": watch["not_drawn"],
               "left out (nobody could take them up)": watch.get("stopped", 0),
               "judged (worded differently)": watch["judged"]}  # fmt: skip
    said = "".join(f", {n:,} {what}" for what, n in of_them.items() if n)
    counts = f"{watch['audits']:,}, {watch['pending']:,} pending{said}; "
    if watch["rung"] is None:
        return counts + "the promise is broken at any threshold: the teacher answers all"
    if watch["rung"] == 0:
        return counts + "the promise stands"
    return counts + f"the promise broke: threshold tightened to {watch['accept_above']:.4f}"


def _counts(of: dict[str, int]) -> str:
    void = f", {of['void']:,} by the student for a failing teacher" if of["void"] else ""
    known = f", {of['remembered']:,} from memory" if of["remembered"] else ""
    return (
        f"{of['student']:,} texts by the student, {of['teacher']:,} by the teacher{void}{known}, "
        f"{of['refused']:,} requests refused"
    )
