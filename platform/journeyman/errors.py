"""The errors a user can act on. Each message says what is wrong, where, and what to do.

Only the command line and the HTTP edge turn these into words and codes.
"""


class JourneymanError(Exception):
    """Base of every error that a user, not a programmer, can mend."""


class RecipeError(JourneymanError):
    """The recipe is wrong: edit the YAML file or the ``--set`` override that it names."""


class ModelError(JourneymanError):
    """A model cannot be found, read or started."""


class DataError(JourneymanError):
    """A corpus, label dataset or checkpoint is missing, damaged or of another kind than asked."""


class ClusterError(JourneymanError):
    """Ray, a replica, a port or a disk does not give what the run needs."""


class BundleMismatch(JourneymanError):  # noqa: N818 - the design's name for it
    """A policy bundle does not belong to the models it is to be served with."""
