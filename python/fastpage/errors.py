"""The errors that fastpage raises on purpose: one line each, naming the thing and the remedy."""

from fastpage._C import Error as FastpageError
from fastpage._C import InvalidArgument, ResourceExhausted


class ModelError(InvalidArgument):
    """A model that cannot be served as it is; also a ValueError."""


class UnsupportedArchitecture(ModelError):
    """A checkpoint whose architecture, or an option of it, has no definition here."""


class CheckpointError(ModelError):
    """Checkpoint files that are missing, broken, or do not fit the model's configuration."""


__all__ = [
    "CheckpointError",
    "FastpageError",
    "InvalidArgument",
    "ModelError",
    "ResourceExhausted",
    "UnsupportedArchitecture",
]
