"""The one error of model files, apart from the code that reads them, so that naming it imports no torch."""

from __future__ import annotations


class CheckpointError(ValueError):
    """Model files that are missing, damaged or do not fit the model. The message names the file and the tensor."""
