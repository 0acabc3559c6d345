"""What one sees of a label dataset: rows, figures, differences and copies for other tools.

Reads datasets, finished or not, and returns values; ``journeyman.cli`` puts them into words.
"""

from journeyman.labels.inspect.diff import Difference, diff
from journeyman.labels.inspect.export import FORMATS, Exported, export
from journeyman.labels.inspect.opened import Opened, open_dataset
from journeyman.labels.inspect.show import Row, Token, rows
from journeyman.labels.inspect.stats import Share, Stats, stats

__all__ = [
    "FORMATS",
    "Difference",
    "Exported",
    "Opened",
    "Row",
    "Share",
    "Stats",
    "Token",
    "diff",
    "export",
    "open_dataset",
    "rows",
    "stats",
]
