"""What the closing table and the report's page look at beside accuracy."""

from __future__ import annotations

from pydantic import Field

from journeyman.recipe.base import Section


class Report(Section):
    """What the closing table and the report's page look at beside accuracy; none of it decides
    anything."""

    positive: str | None = Field(
        None,
        description="Label that the job is about finding (spam, say): its precision and recall "
        "stand beside accuracy.",
    )
