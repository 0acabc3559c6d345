"""The dataset card: a README.md that says what a label dataset is, from its own manifest.

The front matter is that of a Hugging Face dataset card, so that the folder can be uploaded as it
is; ``datasets.load_dataset`` finds the shards by it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from journeyman.labels import dataset
from journeyman.labels.schema import Commit
from journeyman.labels.store import LabelStore

NAME = "README.md"
_LISTED_FILES = 500  # data files that the front matter names; of more it names the folder
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"),
          (10**7, "1M<n<10M"), (10**8, "10M<n<100M"), (10**9, "100M<n<1B"))  # fmt: skip
_TASKS = {
    "classes": "text-classification",
    "logits": "text-generation",
    "generate": "text-generation",
    "rationales": "text-generation",
}
_WHAT = {
    "classes": "for each row the teacher's distribution over classes",
    "logits": "for each text the teacher's next-token distributions",
    "generate": "for each row the teacher's answer with its next-token distributions",
    "rationales": "for each row sampled reasonings, and the answer that most of them give",
}


def write(store: LabelStore, splits: Mapping[str, int] | None = None) -> str:
    """Write the card of a finished dataset into it and return its text; raises DataError.

    splits: rows of the corpus by split, where the manifest does not have them.
    """
    manifest = dataset.finished_manifest(store)
    commits = list(store.commits().values())
    reasons = Counter(
        row.error_class
        for commit in commits
        if commit.quarantined
        for row in store.read_quarantine(commit)
    )
    text = render(manifest, commits, reasons, splits or manifest.get("splits"))
    store.write_text(NAME, text)
    return text


def render(
    manifest: Mapping[str, Any],
    commits: Sequence[Commit],
    quarantined: Mapping[str, int],
    splits: Mapping[str, int] | None = None,
) -> str:
    """The card's text. quarantined: rows by kind of error; splits: rows of the corpus."""
    sections = [
        _title(manifest),
        _teacher(manifest),
        _labels(manifest),
        _codec(manifest),
        _rows(manifest, splits),
        _set_aside(manifest, quarantined),
        _cost(manifest),
        _loading(manifest),
        _limits(manifest),
    ]
    return _front_matter(manifest, commits) + "\n".join(s for s in sections if s)


def _front_matter(manifest: Mapping[str, Any], commits: Sequence[Commit]) -> str:
    kind, rows = manifest["identity"]["kind"], manifest["totals"]["ok"]
    files = [c.data for c in commits if c.ok]  # datasets cannot read one without rows
    data = files if len(files) <= _LISTED_FILES else "shards/*.parquet"
    about = {
        "pretty_name": f"{kind.capitalize()} labels by {_name(manifest)}",
        "task_categories": [_TASKS[kind]],
        "size_categories": [next((words for n, words in _SIZES if rows < n), "n>1B")],
        "tags": ["knowledge-distillation", "synthetic", "journeyman"],
        "configs": [{"config_name": "default", "data_files": data}],
    }
    return f"---\n{yaml.safe_dump(about, sort_keys=False, allow_unicode=True)}---\n\n"


def _title(manifest: Mapping[str, Any]) -> str:
    kind = manifest["identity"]["kind"]
    return (
        f"# {kind.capitalize()} labels by {_name(manifest)}\n\n"
        f"Written by Journeyman: {_WHAT[kind]}. This page is made from `manifest.json`.\n"
    )


def _name(manifest: Mapping[str, Any]) -> str:
    """The teacher's name without where it lies; of an ensemble those of all."""
    identity = manifest["identity"]
    members = identity.get("members") or {"teacher": identity}
    names = [str(facts["teacher"]["model"]) for facts in members.values()]
    # models.teacher calls an adapter and an API's model so.
    bare = [name.split(" at http")[0].split(" with ")[0] for name in names]
    return " and ".join(name.rstrip("/").rsplit("/", 1)[-1] for name in bare)


def _teacher(manifest: Mapping[str, Any]) -> str:
    identity = manifest["identity"]
    facts = {
        **identity["teacher"],
        "dtype": identity.get("dtype"),
        "engine arguments": identity.get("engine_args"),
        **(manifest.get("versions") or {}),
    }
    return _section("Teacher", _facts(facts))


def _labels(manifest: Mapping[str, Any]) -> str:
    """What was asked: prompts in full, since labels mean nothing without them."""
    identity = manifest["identity"]
    asked = {"kind": identity["kind"], **identity["labels"]}
    if asked.get("scoring") in ("direct", "verbalizer"):
        del asked["target"]  # of channel scoring only
    for name in ("codec", "k", "draws"):
        asked.pop(name, None)  # they have a section of their own
    blocks = []
    for name in ("system", "prompt", "context", "target", "answer_prompt"):
        text = asked.pop(name, None)
        if text:
            blocks.append(f"{name}:\n\n{_fenced(text)}\n")
    classes = asked.pop("classes", None)
    if classes:
        rows = [
            [f"`{label}`", words if isinstance(words, str) else "; ".join(words)]
            for label, words in dict(classes).items()
        ]
        blocks.append("Classes, in the order of `class_logprobs`:\n\n"
                      + _table(["label", "words"], rows))  # fmt: skip
    facts = {
        **asked,
        "prompt digest": identity.get("prompt"),
        "corpus digest": identity.get("corpus"),
    }
    return _section("Labels", _facts(facts) + "\n" + "\n".join(blocks))


def _codec(manifest: Mapping[str, Any]) -> str:
    codec = manifest.get("codec")
    if not codec:
        return ""
    facts = {name: value for name, value in codec.items() if name != "layout"}
    return _section("Token distributions", _facts(facts))


def _rows(manifest: Mapping[str, Any], splits: Mapping[str, int] | None) -> str:
    totals, filtered = manifest["totals"], _left_out(manifest)
    skipped = totals["filtered"] + filtered["rows"]
    kept = totals["ok"] - filtered["rows"]
    text = (
        f"{totals['rows']:,} rows = {kept:,} labeled + {totals['quarantined']:,} in quarantine + "
        f"{skipped:,} filtered.\n"
    )
    counts = {"cut to fit the teacher's context": totals.get("truncated"),
              "copied from a cache": totals.get("copied")}  # fmt: skip
    text += _facts({name: n for name, n in counts.items() if n})
    if splits:
        rows = [[split, f"{n:,}"] for split, n in splits.items() if n]
        text += "\nBy split, as in the corpus:\n\n" + _table(["split", "rows"], rows)
    return _section("Rows", text)


def _left_out(manifest: Mapping[str, Any]) -> Mapping[str, Any]:
    return manifest.get("filtered") or {"rows": 0, "by_filter": {}, "filters": {}, "file": None}


def _set_aside(manifest: Mapping[str, Any], quarantined: Mapping[str, int]) -> str:
    totals, filtered = manifest["totals"], _left_out(manifest)
    rows = [["quarantine", name, "", f"{n:,}"] for name, n in quarantined.items()]
    if totals["filtered"]:
        rows.append(["skipped", "overflow", "", f"{totals['filtered']:,}"])
    rows += [
        ["filter", name, str(filtered["filters"].get(name, "")), f"{n:,}"]
        for name, n in filtered["by_filter"].items()
    ]
    if not rows:
        return ""
    return _section("Rows set aside", _table(["", "reason", "setting", "rows"], rows))


def _cost(manifest: Mapping[str, Any]) -> str:
    totals, cost = manifest["totals"], manifest.get("cost") or {}
    price = {name: dollars for name, dollars in (cost.get("price") or {}).items() if dollars}
    facts = {
        "prompt tokens": totals["prompt_tokens"],
        "of them cached": totals["cached_tokens"],
        "output tokens": totals["output_tokens"],
        "replica seconds": round(totals["replica_seconds"]),
        "bytes of the data files": totals["bytes"],
        "dollars": cost.get("dollars"),
        "at dollars": ", ".join(f"{v:g} {name.replace('_', ' ')}" for name, v in price.items()),
    }
    return _section("What it took", _facts(facts))


def _loading(manifest: Mapping[str, Any]) -> str:
    text = (
        "```python\n"
        "from journeyman.labels import dataset\n\n"
        'table = dataset.read("PATH OR URL OF THIS FOLDER")\n'
        "```\n\n"
        "without the rows that filters leave out; `dataset.to_hf` and `dataset.read_ray` give the "
        "same as a Hugging Face or a Ray dataset. With nothing of ours installed, "
        '`datasets.load_dataset("THIS FOLDER")` reads the data files'
    )
    if manifest["identity"]["kind"] in ("classes", "rationales"):
        return _section("Loading", text + ".\n")
    return _section("Loading", text + (
        "; `logprobs` are packed, and read with\n\n"
        "```python\n"
        "codec = dataset.codec_of(manifest)  # manifest.json, as a dict\n"
        'read = codec.decode(row["logprobs"], row["n_positions"])\n'
        "read.token_ids, read.logprobs, read.log_tail_mass\n"
        "```\n"
    ))  # fmt: skip


def _limits(manifest: Mapping[str, Any]) -> str:
    lines = [
        "These are a model's opinions, with its errors and its biases; `gold` alone is not of "
        "its making.",
        "No licence is stated here. Those of the corpus's sources, and what the teacher's licence "
        "says of the use of its outputs, are yours to state.",
    ]
    if manifest.get("log_prior"):
        lines.append(
            "`class_logprobs` are as the teacher gave them; subtract the manifest's `log_prior` "
            "and normalise to get what Journeyman trains on and serves."
        )
    if _left_out(manifest)["rows"]:
        lines.append(
            "The data files still hold the rows that filters leave out; their ids are in "
            f"`{_left_out(manifest)['file']}`."
        )
    return _section("Limits", "".join(f"- {line}\n" for line in lines))


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _facts(facts: Mapping[str, Any]) -> str:
    """A list of what is known; what is not, or is empty, is left out."""
    return "".join(
        f"- {name.replace('_', ' ')}: {_value(value)}\n"
        for name, value in facts.items()
        if value not in (None, "", [], {}, ())
    )


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}"
    if isinstance(value, str) and "\n" not in value:
        return value
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def _fenced(text: str) -> str:
    """A code block that no run of backticks in the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text.rstrip()}\n{fence}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [list(head), ["---"] * len(head), *(list(row) for row in rows)]
    return "".join(
        "| " + " | ".join(c.replace("|", "\\|").replace("\n", " ") for c in row) + " |\n"
        for row in cells
    )
