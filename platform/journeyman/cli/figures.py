"""A label dataset in figures, for a person: statistics, differences, and what a requeue did."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from journeyman.cli.text import counts, interval, one_line, printable, size, table
from journeyman.labels.inspect import Difference, Opened, Stats
from journeyman.labels.inspect.stats import PERCENTILES, Reason, reasons

# --- statistics ---


def stats_text(stats: Stats) -> str:
    blocks = [
        _stats_head(stats),
        table([*_accounts(stats)]),
        table(_class_rows(stats)),
        _quantiles(stats),
        _reasons(stats.quarantine),
    ]
    return "\n\n".join(block for block in blocks if block)


def _stats_head(stats: Stats) -> str:
    return "\n".join([f"{stats.where}   {stats.kind} labels by {stats.teacher}", *stats.notes])


def _accounts(stats: Stats) -> Iterator[list[str]]:
    n_filtered = sum(stats.filtered.values())
    yield ["rows", f"{stats.rows:,} = {stats.kept:,} labeled + {stats.quarantined:,} in quarantine "
                   f"+ {n_filtered:,} filtered"]  # fmt: skip
    yield ["splits", counts(stats.splits)]
    if stats.filtered:
        yield ["filtered", counts(stats.filtered)]
    if stats.with_gold:
        yield ["as gold", f"{interval(stats.with_gold)} of {stats.with_gold.n:,} rows with gold"]
    if stats.finish_reasons:
        yield ["ended by", counts(stats.finish_reasons)]
    if stats.truncated or stats.copied:
        yield ["of them", f"{stats.truncated:,} cut to fit, {stats.copied:,} copied from the cache"]
    cached = (
        f" ({stats.cached_tokens / stats.prompt_tokens:.0%} cached)" if stats.cached_tokens else ""
    )
    yield ["tokens", f"{stats.prompt_tokens:,} read{cached}, {stats.output_tokens:,} written"]
    yield ["on disk", _on_disk(stats)]


def _on_disk(stats: Stats) -> str:
    # The files hold the rows that filters leave out, too; their tokens are not counted here.
    if stats.recorded_positions and not stats.filtered:
        each = f"{stats.bytes / stats.recorded_positions:.1f} bytes a recorded token"
        return f"{size(stats.bytes)}, {each} ({stats.recorded_positions:,} of them)"
    return f"{size(stats.bytes)}, {stats.bytes / max(1, stats.rows):.0f} bytes a row"


def _class_rows(stats: Stats) -> list[list[str]]:
    if not stats.classes:
        return []
    has_gold = stats.with_gold is not None
    n_gold = sum(c.gold for c in stats.classes) or 1
    rows = [["label", "teacher", "", *(["gold", "", "as gold"] if has_gold else [])]]
    for c in stats.classes:
        row = [c.label, f"{c.teacher:,}", f"{c.teacher / max(1, stats.kept):.1%}"]
        if has_gold:
            right = f"{c.both / c.gold:.3f}" if c.gold else "-"
            row += [f"{c.gold:,}", f"{c.gold / n_gold:.1%}", right]
        rows.append(row)
    return rows


def _quantiles(stats: Stats) -> str:
    if not stats.quantiles:
        return ""
    rows = [["quantiles", *(f"{p}%" for p in PERCENTILES)]]
    rows += [[name, *(f"{v:,.4g}" for v in values)] for name, values in stats.quantiles.items()]
    text = table(rows)
    if stats.n_decoded and stats.n_decoded < stats.kept:
        text += f"\nEntropy is that of {stats.n_decoded:,} rows, spread over the shards."
    return text


def _reasons(quarantine: Sequence[Reason]) -> str:
    if not quarantine:
        return ""
    rows = [
        [r.error_class, f"{r.n:,}", f"{r.first_id[:12]}: {printable(r.first_message)}"]
        for r in quarantine
    ]
    return table([["in quarantine", "rows", "the first"], *rows])


# --- differences ---


def diff_text(difference: Difference) -> str:
    d = difference
    blocks = [
        "\n".join([f"A  {d.where_a}", *d.notes_a, f"B  {d.where_b}", *d.notes_b]),
        table([["setting", "A", "B"], *([s.key, _short(s.a), _short(s.b)] for s in d.settings)])
        if d.settings
        else "Made in the same way, of the same corpus.",
        table([*_common(d)]),
        _most(d),
    ]
    return "\n\n".join(block for block in blocks if block)


def _common(d: Difference) -> Iterator[list[str]]:
    yield ["rows in both", f"{d.both:,}"]
    if d.only_a:
        yield ["only in A", f"{d.only_a:,}; in B: {counts(d.gone_b)}"]
    if d.only_b:
        yield ["only in B", f"{d.only_b:,}; in A: {counts(d.gone_a)}"]
    if d.same_answers:
        what = {"classes": "same likeliest class", "logits": "same tokens",
                "generate": "same output", "rationales": "same answer"}[d.kind]  # fmt: skip
        yield [what, interval(d.same_answers)]
    if d.total_variation is not None and d.kl is not None:
        yield ["total variation", f"{d.total_variation:.4f} on average"]
        yield ["KL(A || B)", f"{d.kl:.4g} nats on average"]
    if d.logprob_max is not None and d.logprob_mean is not None:
        yield ["log-probabilities", f"{d.logprob_max:.3g} apart at most, {d.logprob_mean:.3g} on "
                                    f"average, over {d.n_logprobs:,} that both store"]  # fmt: skip


def _most(d: Difference) -> str:
    if not d.most:
        return "No row differs." if d.both else ""
    lines = ["The rows that differ most:" if len(d.most) > 1 else "The row that differs most:"]
    for row in d.most:
        apart = "" if row.distance is None else f"  apart {row.distance:.3g}"
        lines.append(f"\n{row.id}  {row.split}{apart}")
        if row.text is not None:
            lines.append(f"  {one_line(row.text)}")
        lines += [f"  A  {one_line(row.a)}", f"  B  {one_line(row.b)}"]
    return "\n".join(lines)


# --- rows labeled again ---


def requeued_text(before: Opened, after: Opened) -> str:
    """What became of the rows that were in quarantine."""
    was, now = _became(before), _became(after)
    n = was["quarantined"]
    fates = [f"{now['ok'] - was['ok']:,} labeled now"]
    if now["filtered"] > was["filtered"]:
        fates.append(f"{now['filtered'] - was['filtered']:,} filtered")
    fates.append(f"{now['quarantined']:,} in quarantine again")
    rows = "1 row was" if n == 1 else f"{n:,} rows were"
    text = f"{rows} in quarantine: {', '.join(fates)}."
    return "\n\n".join([text, *filter(None, [_reasons(reasons(after))])])


def _became(opened: Opened) -> dict[str, int]:
    names = ("ok", "filtered", "quarantined")
    return {name: sum(getattr(commit, name) for commit in opened.commits) for name in names}


def _short(value: Any) -> str:
    return one_line(json.dumps(value, ensure_ascii=False), limit=50)
