"""The whole configuration of a distillation: one validated model, loaded from YAML.

Owns the names, units and defaults of every setting and the sentences said about wrong ones.
Knows nothing of what the steps do with them.
"""

from journeyman.recipe.base import SPLITS, Section, Split, differing_paths, digest
from journeyman.recipe.cluster import Cluster
from journeyman.recipe.corpus import Columns, Corpus
from journeyman.recipe.labels import (
    Classes,
    Example,
    Filters,
    Generate,
    Labels,
    Logits,
    Rationales,
    TokenLabels,
)
from journeyman.recipe.loading import Recipe, load, parse, parse_new
from journeyman.recipe.report import Report
from journeyman.recipe.serving import Breaker, Cascade, Certify, Feedback, Judge
from journeyman.recipe.student import Lora, OnPolicy, RowWeight, Student, Training
from journeyman.recipe.teacher import Price, Teacher

__all__ = [
    "SPLITS",
    "Breaker",
    "Cascade",
    "Certify",
    "Classes",
    "Cluster",
    "Columns",
    "Corpus",
    "Example",
    "Feedback",
    "Filters",
    "Generate",
    "Judge",
    "Labels",
    "Logits",
    "Lora",
    "OnPolicy",
    "Price",
    "Rationales",
    "Recipe",
    "Report",
    "RowWeight",
    "Section",
    "Split",
    "Student",
    "Teacher",
    "TokenLabels",
    "Training",
    "differing_paths",
    "digest",
    "load",
    "parse",
    "parse_new",
]
