"""What the closing table, the report's page and trials look at beside accuracy."""

from __future__ import annotations

from pydantic import Field

from journeyman.recipe.base import Section


class Report(Section):
    """What the closing table and the report's page look at beside accuracy; no step goes by it."""

    positive: str | None = Field(
        None,
        description="Label that the job is about finding (spam, say): its precision and recall "
        "stand beside accuracy, and label --try --take best goes by its AUC.",
    )
    rank_by: str | None = Field(
        None,
        description="text, or a column of corpus.columns.meta: rows with the same value are one "
        "list of candidates, ranked by the probability of the positive label (mean reciprocal rank "
        "and recall at 1).",
    )
