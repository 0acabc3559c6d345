"""Where the rows come from and how they are split."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from journeyman.recipe.base import Count, Section, Share, Split


class Columns(Section):
    """Names of the source's columns."""

    text: str = Field("text", description="Column with the request's text.")
    label: str | None = Field(
        None, description="Column with the gold label, if any; never shown to the teacher."
    )
    split: str | None = Field(None, description="Column with the source's own split names.")
    group: str | None = Field(
        None, description="Rows that share this column's value fall into one split."
    )
    meta: tuple[str, ...] = Field(
        (), description="Further columns to carry along, for templates and for reading."
    )


class NearDuplicates(Section):
    """Rows that nearly repeat another one: MinHash (Broder 1997), before any is labeled."""

    similarity: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.8, description="Jaccard similarity of two texts' shingles from which on the "
        "later one is left out; across splits the one nearer to training goes."
    )  # fmt: skip
    shingle: Count = Field(3, description="Words of a shingle.")
    permutations: Count = Field(128, description="Hash functions of a signature.")


class Corpus(Section):
    """Where the rows come from and how they are split."""

    sources: tuple[str, ...] = Field(
        min_length=1,
        description="Paths, globs or fsspec URLs of Parquet, JSONL, CSV, TSV or text files "
        "(.gz, .bz2, .xz, .zst too) or of Hugging Face dataset folders.",
    )
    format: Literal["auto", "parquet", "jsonl", "csv", "tsv", "text", "hf"] = Field(
        "auto", description="Format of every source; auto goes by the file's name."
    )
    columns: Columns = Field(default_factory=Columns)
    feedback: str | None = Field(
        None,
        description="What a running cascade kept (its cascade.feedback.to): escalated texts join "
        "train, audited ones are the held-out splits, in place of the sources' own, so that the "
        "next certificate is about today's traffic.",
    )
    feedback_shares: dict[Split, Share] = Field(
        default={"calibrate": 0.2, "certify": 0.6, "test": 0.2},
        description="Shares of the audited texts; none is ever trained on.",
    )
    where: dict[str, tuple[str, ...]] = Field(
        default_factory=dict,
        description="Keep only rows whose column (key) holds one of these values.",
    )
    split_map: dict[str, Split | dict[Split, Share]] = Field(
        default_factory=dict,
        description="The source's split name to ours, or to shares of ours (drawn by a hash of "
        "the id, so stable when the corpus grows). Splits it does not name are left out.",
    )
    shares: dict[Split, Share] = Field(
        default={"train": 0.7, "calibrate": 0.1, "certify": 0.1, "test": 0.1},
        description="Shares of the splits where the source has none of its own.",
    )
    limits: dict[Split, Count] = Field(
        default_factory=dict,
        description="At most so many rows of a split (those with the lowest hashes of the id).",
    )
    rows_per_shard: Count = Field(
        2000,
        description="Rows of a corpus shard, the unit of work, commit and resume: aim at one to "
        "three minutes of a replica (some hundred rows on a CPU, thousands on a GPU).",
    )
    max_malformed: Share = Field(
        0.01, description="Stop if more than this share of the source's rows is malformed."
    )

    near_duplicates: NearDuplicates | None = Field(
        None, description="Leave out near duplicates; by default only exact ones collapse."
    )

    @model_validator(mode="after")
    def _splits_make_sense(self) -> Corpus:
        def check(shares: dict[Split, float], name: str) -> None:
            if abs(sum(shares.values()) - 1) > 1e-6:
                raise ValueError(f"{name} must add up to 1, got {sum(shares.values()):g}")

        check(self.shares, "shares")
        check(self.feedback_shares, "feedback_shares")
        if self.feedback_shares.get("train"):
            raise ValueError("feedback_shares: audited texts must not be trained on; they carry "
                             "the next certificate")  # fmt: skip
        for source_split, target in self.split_map.items():
            if isinstance(target, dict):
                check(target, f"split_map.{source_split}")
        if self.split_map and not self.columns.split:
            raise ValueError("split_map needs columns.split, the column with the source's splits")
        return self
