"""Filters over finished labels: which rows to leave out, and by which measure.

They ask the teacher nothing and change no label: one file lists the rows that readers leave out,
so that other settings need this pass only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from journeyman.errors import DataError, RecipeError
from journeyman.labels import dataset
from journeyman.labels.codec import Codec, Distributions
from journeyman.labels.prior import corrected
from journeyman.labels.store import LabelStore
from journeyman.recipe import (
    Classes,
    Filters,
    Generate,
    Labels,
    Logits,
    Rationales,
    Recipe,
    digest,
)
from journeyman.teacher.rationales import as_number

if TYPE_CHECKING:
    import pyarrow as pa


FILE = "filtered/filters.parquet"
_GRAM = 4  # words


class Failure(NamedTuple):
    """A row that a filter leaves out: its place in the table, the filter's name, the value seen."""

    row: int
    filter: str
    value: float | None


class _Rows(NamedTuple):
    """What a filter looks at. log_prior: float64[c]."""

    table: pa.Table
    labels: Labels
    codec: Codec | None
    log_prior: np.ndarray | None

    def class_logprobs(self) -> np.ndarray:
        """float64[n, c], prior corrected."""
        assert isinstance(self.labels, Classes | Rationales)
        return corrected(class_logprobs(self.table, len(self.labels.classes)), self.log_prior)


class _Seen(NamedTuple):
    """What a filter saw. values: float64[n]; fails: bool[n]."""

    values: np.ndarray
    fails: np.ndarray


# --- which filters go with which labels ---


def check(labels: Labels, *, has_gold: bool = True) -> None:
    """Raise RecipeError for a filter that says nothing of labels of this kind."""
    filters = labels.filters
    for name in _asked(filters):
        if reason := _why_not(name, labels, has_gold):
            raise RecipeError(f"labels.filters.{name}: {reason}; remove it.")
    if filters.min_tokens and filters.max_tokens and filters.min_tokens > filters.max_tokens:
        raise RecipeError(
            f"labels.filters: min_tokens {filters.min_tokens} is above max_tokens "
            f"{filters.max_tokens}, so that no row is left; exchange them."
        )


def _asked(filters: Filters) -> dict[str, Any]:
    """The filters that are set, in the order in which they are tried."""
    settings = filters.model_dump(mode="json")
    return {n: v for n, v in settings.items() if v is not None and v is not False}


def _why_not(name: str, labels: Labels, has_gold: bool) -> str | None:
    """Why a filter cannot apply; None where it can."""
    kind = labels.kind
    over_classes = isinstance(labels, Classes) or (
        isinstance(labels, Rationales) and bool(labels.classes)
    )
    if name == "min_label_mass":
        if isinstance(labels, Classes) and labels.scoring == "channel":
            return "channel scoring puts no probability on label words"
        return None if over_classes else f"{_without_classes(labels)} have no label words"
    if name == "max_entropy":
        if isinstance(labels, Rationales) and not labels.classes:
            return f"{_without_classes(labels)} record no distribution"
        return None
    if name == "min_agreement":
        if not isinstance(labels, Rationales):
            return f"it compares the samples of rationales, and {kind} has none"
        return None if labels.samples > 1 else "with one sample agreement is always 1"
    if name in ("min_tokens", "max_tokens"):
        return "it counts tokens of an answer or of a text, and classes has neither" * isinstance(
            labels, Classes
        )
    if name in ("max_repetition", "finished"):
        return None if isinstance(labels, Generate | Rationales) else f"{kind} writes no answer"
    if isinstance(labels, Logits):
        return "logits gives no answer to compare"
    return None if has_gold else "it needs gold labels, and corpus.columns.label names none"


def _without_classes(labels: Labels) -> str:
    return "rationales without classes" if isinstance(labels, Rationales) else labels.kind


# --- what they measure: pure ---


def failed(
    table: pa.Table,
    labels: Labels,
    filters: Filters,
    codec: Codec | None = None,
    log_prior: np.ndarray | None = None,
) -> list[Failure]:
    """Rows of a label table that a filter leaves out, each with the first filter that does.

    table: columns of ``schema.label_schema(labels.kind)``; log_prior: float64[c], as in the
    manifest; codec: of the table's token distributions, where max_entropy needs them.
    """
    asked = _asked(filters)
    names = list(asked)
    rows = _Rows(table, labels, codec, log_prior)
    first = np.full(len(table), -1)
    values = np.full(len(table), np.nan)
    for number_, (name, setting) in enumerate(asked.items()):
        seen = _MEASURES[name](rows, setting)
        fresh = seen.fails & (first < 0)
        first[fresh], values[fresh] = number_, seen.values[fresh]
    return [
        Failure(int(row), names[first[row]], _finite(values[row]))
        for row in np.flatnonzero(first >= 0)
    ]


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _label_mass(rows: _Rows, least: float) -> _Seen:
    mass = floats(rows.table, "label_mass")
    return _Seen(mass, mass < least)


def _entropy(rows: _Rows, most: float) -> _Seen:
    if isinstance(rows.labels, Logits | Generate):
        # Without a codec a teacher behind a URL gave no distributions: nothing fails.
        nothing = np.full(len(rows.table), np.nan)
        entropy = token_entropies(rows.table, rows.codec) if rows.codec else nothing
    else:
        entropy = class_entropies(rows.class_logprobs())
    return _Seen(entropy, entropy > most)


def _agreement(rows: _Rows, least: float) -> _Seen:
    agreement = floats(rows.table, "agreement")
    # Stored as float32: 0.6 in a recipe must not leave out 3 of 5.
    return _Seen(agreement, agreement < np.float32(least))


def _too_short(rows: _Rows, least: int) -> _Seen:
    n_tokens = answer_tokens(rows.table, rows.labels)
    return _Seen(n_tokens, n_tokens < least)


def _too_long(rows: _Rows, most: int) -> _Seen:
    n_tokens = answer_tokens(rows.table, rows.labels)
    return _Seen(n_tokens, n_tokens > most)


def _repetitive(rows: _Rows, most: float) -> _Seen:
    share = repetitions(rows.table, rows.labels)
    return _Seen(share, share > most)


def _unfinished(rows: _Rows, _: bool) -> _Seen:
    import pyarrow.compute as pc

    cut_off = pc.equal(rows.table["finish_reason"], "length").to_numpy()
    return _Seen(answer_tokens(rows.table, rows.labels), cut_off.astype(bool))


def _differs_from_gold(rows: _Rows, _: bool) -> _Seen:
    """A row without gold differs from none. values: the probability that the teacher gave the
    gold class, where there are classes."""
    gold = rows.table["gold"].to_pylist()
    values = np.full(len(gold), np.nan)
    if isinstance(rows.labels, Classes):
        logprobs = rows.class_logprobs()
        place = {label: i for i, label in enumerate(rows.labels.classes)}
        column = np.array([place.get(label, -1) for label in gold], dtype=np.int64)
        known = np.flatnonzero(column >= 0)
        values[known] = np.exp(logprobs[known, column[known]])
        agrees = logprobs.argmax(axis=1) == column
    else:
        said = rows.table["output" if isinstance(rows.labels, Generate) else "answer"].to_pylist()
        pairs = zip(said, gold, strict=True)
        agrees = np.array([g is not None and same_answer(a, g, rows.labels) for a, g in pairs])
    has_gold = np.array([label is not None for label in gold], dtype=bool)
    return _Seen(values, has_gold & ~agrees.astype(bool))


# In the order in which they are tried: that of the recipe's fields.
_MEASURES: dict[str, Callable[[_Rows, Any], _Seen]] = {
    "min_label_mass": _label_mass,
    "max_entropy": _entropy,
    "min_agreement": _agreement,
    "min_tokens": _too_short,
    "max_tokens": _too_long,
    "max_repetition": _repetitive,
    "finished": _unfinished,
    "matches_gold": _differs_from_gold,
}


def floats(table: pa.Table, column: str) -> np.ndarray:
    """float64[n]; nan where there is no value. Comparisons with nan fail no row."""
    import pyarrow as pa

    return table[column].cast(pa.float64()).to_numpy()


def class_logprobs(table: pa.Table, n_classes: int) -> np.ndarray:
    """float64[n, c], as stored: before prior correction."""
    flat = table["class_logprobs"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.astype(np.float64).reshape(len(table), n_classes)


def class_entropies(logprobs: np.ndarray) -> np.ndarray:
    """float64[n], nats, of normalised logprobs: float64[n, c]; 0 log 0 is 0."""
    weighted = np.exp(logprobs) * np.where(np.isneginf(logprobs), 0.0, logprobs)
    return -weighted.sum(axis=-1)


def token_entropies(table: pa.Table, codec: Codec) -> np.ndarray:
    """float64[n], nats: mean over a row's positions; nan for a row without any."""
    read = dataset.distributions(table, codec)
    return np.array([_mean_entropy(codec, one) for one in read], dtype=np.float64)


def _mean_entropy(codec: Codec, read: Distributions | None) -> float:
    if read is None or not len(read.log_tail_mass):
        return np.nan
    entropies = position_entropies(read.logprobs, read.log_tail_mass)
    if codec.name == "sampled":
        # Counts of n draws look surer than what they are drawn from, by about (m - 1) / 2n for m
        # different tokens (Miller 1955, "Note on the Bias of Information Estimates").
        n_tokens = np.isfinite(read.logprobs).sum(axis=1)
        entropies = entropies + (n_tokens - 1) / (2 * codec.k)
    return float(entropies.mean())


def position_entropies(logprobs: np.ndarray, log_tail_mass: np.ndarray) -> np.ndarray:
    """float64[positions], nats, the tail as one token: at most the true entropy.

    logprobs: float32[positions, k]; log_tail_mass: float32[positions].
    """
    every = np.concatenate([logprobs, log_tail_mass[:, None]], axis=1).astype(np.float64)
    return class_entropies(every)


def answer_tokens(table: pa.Table, labels: Labels) -> np.ndarray:
    """float64[n]: tokens of the answer, or of the text scored; of samples their mean."""
    if not isinstance(labels, Rationales):
        return floats(table, "n_tokens")
    written = floats(table, "n_output_tokens")
    if labels.classes:  # the second pass counts one output token for each label and sample
        scored = table["class_logprobs"].is_valid().to_numpy()
        written = written - scored * (labels.samples - floats(table, "n_unparsed")) * len(
            labels.classes
        )
    return written / labels.samples


def repetitions(table: pa.Table, labels: Labels) -> np.ndarray:
    """float64[n]: of the output, or of the reasoning that is kept."""
    texts = table["output" if isinstance(labels, Generate) else "reasoning"].to_pylist()
    return np.array([repetition(text) for text in texts], dtype=np.float64)


def repetition(text: str) -> float:
    """Share of the text's word 4-grams that occurred in it before; 0 for a text without any."""
    words = text.split()
    grams = list(zip(*(words[i:] for i in range(_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def same_answer(answer: str, gold: str, labels: Labels) -> bool:
    """Whether a written answer is the gold one: by its text; of rationales also by its number, or
    by the words of the class, upper and lower case alike."""
    if not isinstance(labels, Rationales):
        return answer.strip() == gold.strip()
    if labels.number:
        return as_number(answer) == as_number(gold)
    wanted = {gold, labels.classes.get(gold, gold)}
    return answer.strip().casefold() in {words.strip().casefold() for words in wanted}


# --- over a dataset ---

_SPLIT = "train"  # that filters are for


def apply(store: LabelStore, manifest: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Write down which rows of a finished dataset the recipe's filters leave out.

    Returns the facts for its manifest; a dataset that was filtered in the same way is not read
    again. Raises RecipeError, and DataError where no row would be left.
    """
    labels = recipe.labels
    check(labels, has_gold=bool(recipe.corpus.columns.label))
    asked = _asked(labels.filters)
    inputs = digest([asked, _SPLIT, manifest["digest"], manifest["log_prior"]])
    there: dict[str, Any] | None = manifest.get("filtered")
    if there and there["inputs"] == inputs:
        return {"filtered": there}
    by_filter: Counter[str] = Counter()
    if asked:
        table, n_train = _failures(store, manifest, labels)
        by_filter.update(table["filter"].to_pylist())
        if n_train and len(table) == n_train:
            worst, n = by_filter.most_common(1)[0]
            raise DataError(
                f"labels.filters leave out all {n_train:,} labeled train rows, {n:,} of them by "
                f"{worst}: {asked[worst]}; loosen it (journeyman labels stats shows the values)."
            )
        store.write_table(FILE, table)
    return {
        "filtered": {
            "file": FILE if asked else None,
            "rows": by_filter.total(),
            "by_filter": {name: by_filter[name] for name in asked},
            "filters": asked,
            "inputs": inputs,
        }
    }


def _failures(store: LabelStore, manifest: dict[str, Any], labels: Labels) -> tuple[pa.Table, int]:
    """id, filter and value of every row that a filter leaves out, read shard by shard; and of how
    many rows."""
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = pa.schema([("id", pa.string()), ("filter", pa.string()), ("value", pa.float64())])
    codec = dataset.codec_of(manifest)
    prior = manifest["log_prior"]
    log_prior = None if prior is None else np.asarray(prior, dtype=np.float64)
    found, n_train = [columns.empty_table()], 0
    for every in _labeled(store, manifest):
        table = every.filter(pc.equal(every["split"], _SPLIT))
        n_train += len(table)
        failures = failed(table, labels, labels.filters, codec, log_prior)
        ids = table["id"].take(pa.array([failure.row for failure in failures], pa.int64()))
        found.append(
            pa.table(
                [ids, [f.filter for f in failures], [f.value for f in failures]], schema=columns
            )
        )
    return pa.concat_tables(found), n_train


def _labeled(store: LabelStore, manifest: dict[str, Any]) -> Iterator[pa.Table]:
    commits = store.commits()
    for shard in manifest["shards"]:
        yield store.read_shard(commits[shard])
