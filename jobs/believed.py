"""What is believed instead of the labels of a table: options that commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import tyro

from jobs.options import ViewOptions
from models.errors import WrongUse

if TYPE_CHECKING:
    from pipeline.table.corrections import Corrections

KnownTable = Annotated[
    str | None,
    tyro.conf.arg(
        name="known",
        metavar="TABLE",
        help="another label table, whose labels are taken as true, for some images, classes or pixels; "
        "where it ignores pixels or lacks an image, those of the first table stay.",
        help_behavior_hint="",
    ),
]
KnownView = Annotated[
    str | None,
    tyro.conf.arg(
        name="known-view",
        metavar="NAME|FILE",
        help="a view of --known: a name beside it, or a YAML file; to drop a class from it, say.",
        help_behavior_hint="",
    ),
]


def open_believed(
    table: str,
    corrections: str | None,
    known: str | None,
    known_view: str | None,
    say: Callable[[str], None],
) -> Corrections | None:
    """What counts instead of the labels of a table; says what that is.

    Args:
        table: the label table.
        corrections: ``--corrections``.
        known: ``--known``.
        known_view: ``--known-view``.
        say: told what counts.

    Raises:
        MaskMillError: ``wrong_use``; as ``pipeline.table.corrections.open_corrections`` and ``open_known``.
    """
    from pipeline.table.corrections import OFF, open_corrections, open_known

    if known is None:
        if known_view is not None:
            raise WrongUse("wrong_use", "--known-view is for --known.", "Add --known TABLE.")
        found = open_corrections(table, corrections)
        if found is not None:
            say(f"With {found.described()} (--corrections {OFF} leaves them out).")
        return found
    if corrections not in (None, OFF):
        raise WrongUse("wrong_use", "--known and --corrections are both believed.", "Leave one of them out.")
    beside = open_corrections(table, corrections)
    if beside is not None:
        say(f"Without {beside.described()}: --known is believed instead.")
    found = open_known(table, known, ViewOptions(view=known_view).of_table(known))
    say(f"With {found.described()}, which are believed.")
    return found
