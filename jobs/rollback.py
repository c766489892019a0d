"""``maskmill rollback``: the champion before becomes champion again."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.options import Maybe
from jobs.promote import changing_champion, tell_move, this_user


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Make the champion before the present one champion again, by the ledger of a retraining.

    Attributes:
        retraining: the output of maskmill retrain, or its configuration.
        model: name of the registered model, if the retraining has several.
        why: reason, for the ledger and for a tag of the version that was champion.
        tracking: MLflow tracking URI; default: that of the retraining.
    """

    retraining: Annotated[Positional[str], arg(metavar="OUT|CONFIG")]
    model: Maybe[str] = None
    why: Maybe[str] = None
    tracking: Maybe[str] = None

    def run(self, console: Console | None = None) -> int:
        """Move the alias, and say from where to where.

        Raises:
            MaskMillError: ``nothing_before``; ``output_in_use`` while a retraining runs; as
                ``pipeline.retraining.record`` and ``pipeline.retraining.promotion.rollback``.
        """
        with changing_champion(self.retraining, self.model, self.tracking) as change:
            from pipeline.retraining.promotion import rollback

            entry = rollback(
                change.ledger,
                change.client,
                change.lease,
                change.name,
                why=(self.why or "").strip() or None,
                user=this_user(),
            )
        say = functools.partial((console or Console()).print, soft_wrap=True, highlight=False, markup=False)
        tell_move(say, entry, self.retraining, self.model)
        return 0
