"""``maskmill rollback``: a champion before becomes champion again."""

from __future__ import annotations

import functools
import shlex
from dataclasses import dataclass
from typing import Annotated

from rich.console import Console
from tyro.conf import Positional, arg

from jobs.options import Maybe
from jobs.promote import changing_champion, tell_move, this_user


@dataclass(frozen=True, kw_only=True)
class Rollback:
    """Make the previous champion champion again, as recorded in the ledger of a retraining.

    If the last move was a rollback, nothing moves: --to goes further back.

    Attributes:
        retraining: the output of maskmill retrain, or its configuration.
        to: number of the version to go back to, which was champion; default: the one before.
        model: name of the registered model, if the retraining has several.
        why: reason, for the ledger and for a tag of the version that was champion.
        tracking: MLflow tracking URI; default: that of the retraining.
    """

    retraining: Annotated[Positional[str], arg(metavar="OUT|CONFIG")]
    to: Annotated[Maybe[str], arg(metavar="VERSION")] = None
    model: Maybe[str] = None
    why: Maybe[str] = None
    tracking: Maybe[str] = None

    def run(self, console: Console | None = None) -> int:
        """Move the alias, and say from where to where.

        Raises:
            MaskMillError: ``input_missing``; ``wrong_use``; ``output_in_use`` while a retraining runs; as
                ``pipeline.retraining.record`` and ``pipeline.retraining.promotion.rollback``.
        """
        with changing_champion(self.retraining, self.model, self.tracking) as change:
            from pipeline.retraining.promotion import rollback

            entry = rollback(
                change.ledger,
                change.client,
                change.lease,
                change.name,
                to=self.to,
                why=(self.why or "").strip() or None,
                user=this_user(),
            )
            new = entry.fencing_token == change.lease.run_id
            champions = change.ledger.standing(change.name).champions
        change.tell(entry)
        say = functools.partial((console or Console()).print, soft_wrap=True, highlight=False, markup=False)
        if new:
            tell_move(say, entry, self.retraining, self.model)
            return 0
        by = f" by {entry.user}" if entry.user else ""
        say(
            f"Nothing moved: version {entry.version} of {entry.name} is champion since {entry.time} "
            f"({entry.kind.replace('_', ' ')}{by}, entry {entry.sequence} of the ledger)."
        )
        if len(champions) > 1:
            named = "" if self.model is None else f" --model {shlex.quote(self.model)}"
            again = f"maskmill rollback {shlex.quote(self.retraining)}{named} --to {champions[-2]}"
            say(f"  further back  {again}")
        return 0
