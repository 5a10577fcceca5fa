"""The errors that CHARM raises on purpose.

Each takes one message that says what is wrong, which value it is and what to do. One argument only: an exception whose
constructor needs more does not survive pickling between processes.
"""


class CharmError(Exception):
    """Base of every error that CHARM raises on purpose."""


class TableError(CharmError):
    """A table has wrong columns, types, keys or values."""


class RatingsError(CharmError):
    """A policy model has no rating, or more than one, on the chosen board."""


class GraphError(CharmError):
    """A comparison graph does not determine the quantities asked for: disconnected, or a model never beaten."""


class ConfigError(CharmError):
    """A setting is wrong or contradicts another one."""


class ModelError(CharmError):
    """A reward model folder cannot be used as it is."""


class ArtifactError(CharmError):
    """A stored file is missing, damaged or cannot be written."""


class TrainingError(CharmError):
    """Training failed for a reason that repeats: running it again would not help."""


class WorkerLostError(TrainingError):
    """A training process was killed from outside: worth resuming from its last checkpoint."""


class ServiceError(CharmError):
    """A server that the run needs (Prefect, MLflow, a leaderboard, a model endpoint) does not answer, or not as it should."""


class SamplingError(CharmError):
    """Responses of a policy model could not be had."""
