"""Errors that users can cause and fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MaskMillError(Exception):
    """An error in input, settings or set-up that the user can fix. Raise one of the subclasses.

    Args:
        code: stable, lower-case identifier (``weights_missing``) that tests and scripts may rely on.
        message: what is wrong, with the offending value, file and line if any.
        remedy: how to fix it, as an instruction.
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
        # Ray pickles exceptions; the default reduction would pass only one argument.
        return type(self), (self.code, self.message, self.remedy)


class WrongUse(MaskMillError):
    """The command, its settings or its input are wrong; nothing was done."""

    exit_status = 2


class FailedWork(MaskMillError):
    """The work itself failed, or something it needs is unreachable; the same command may succeed later."""


class Damaged(MaskMillError):
    """A file is damaged or not what it should be."""


def did_you_mean(word: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> str:
    """``Did you mean voc20? `` for a misspelt name, for the beginning of a remedy; empty if nothing is near.

    Args:
        word: what was given; case does not matter.
        known: the valid names.
        most: how many to suggest.
        cutoff: least similarity, 0 to 1 (``difflib.get_close_matches``).
    """
    spelled = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), spelled, n=most, cutoff=cutoff)
    return f"Did you mean {' or '.join(spelled[name] for name in near)}? " if near else ""
