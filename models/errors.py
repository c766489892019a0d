"""The one family of errors that users can cause, and mend."""

from __future__ import annotations


class MaskMillError(Exception):
    """A mistake in input, settings or set-up that the user can put right. Raise one of its subclasses.

    Args:
        code: stable, lower-case identifier (``weights_missing``); tests and scripts may rely on it.
        message: what is wrong, with the offending value, file and line where there is one.
        remedy: what to do about it, as an instruction.
    """

    exit_status = 1

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


class WrongUse(MaskMillError):
    """The command, its settings or its input are wrong; nothing was done."""

    exit_status = 2


class FailedWork(MaskMillError):
    """The work itself failed, or what it needs is not reachable now; the same command may succeed later."""


class Damaged(MaskMillError):
    """A file that MaskMill or somebody else wrote is not what it should be."""
