"""The one family of errors that users can cause, and mend."""

from __future__ import annotations


class MaskMillError(Exception):
    """A mistake in input, settings or set-up that the user can put right.

    Args:
        code: stable, lower-case identifier (``weights_missing``); tests and scripts may rely on it.
        message: what is wrong, with the offending value, file and line where there is one.
        remedy: what to do about it, as an instruction.
    """

    def __init__(self, code: str, message: str, remedy: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n{self.remedy} [{self.code}]"

    def __reduce__(self) -> tuple[type[MaskMillError], tuple[str, str, str]]:
        # Exceptions cross process borders in Ray; the default reduction would pass one argument only.
        return type(self), (self.code, self.message, self.remedy)


FAILED_WORK = frozenset(
    {
        "labelling_failed",
        "process_lost",
        "cluster_unreachable",
        "table_damaged",
        "output_in_use",
        "tracking_unreachable",
        "training_failed",
        "training_data_failing",
        "loss_not_finite",
        "gpu_memory",
        "self_training_collapsed",
    }
)
"""Codes of errors that are no mistake in how a command was written: the work itself failed."""
