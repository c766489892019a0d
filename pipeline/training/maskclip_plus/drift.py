"""The alarm that stops self-training when predictions drift away from the guided phase.

Shapes: C classes.

A student that learns from its own predictions confirms its own mistakes: some classes swallow others while
the loss keeps falling. Without truth, the histogram of predicted classes reveals it. The alarm compares it
with the histogram at the end of the guided phase, when the student had only learned from its teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from models.errors import FailedWork, MaskMillError

_NEGLIGIBLE = 0.01  # of an even share
_LISTED = 5  # classes named in the alarm, of each kind
_VANISHED = 0.1  # of its former share
_NOTABLE = 1.2  # factor of change, up or down


def relative_change(p: Tensor, q: Tensor) -> float:
    """How much class shares differ between two histograms, with equal weight for all classes.

    The Canberra distance (Lance and Williams, 1967) divided by the number of classes: the mean over classes
    of ``|p - q| / (p + q)``. A vanished class counts 1 whatever its size, as in the mean IoU; pixel-weighted
    measures such as the Jensen-Shannon divergence hardly notice the loss of a rare class. Classes below a
    hundredth of an even share in both histograms are weighted down.

    Args:
        p: (C,), non-negative, with a positive sum; normalised here.
        q: (C,), with the same constraints.

    Returns:
        0 for equal histograms up to 1 for disjoint ones.
    """
    p, q = p.double() / p.double().sum(), q.double() / q.double().sum()
    both = p + q + 2 * _NEGLIGIBLE / len(p)
    return float(((p - q).abs() / both).sum() / ((p + q) / both).sum())


class DriftAlarm:
    """Compares histograms of predicted classes with a reference and raises if they stay far from it.

    Args:
        names: of the C classes.
        bound: maximum acceptable ``relative_change`` (0 to 1).
        patience: number of consecutive steps beyond the bound that raise the alarm.
    """

    def __init__(self, names: Sequence[str], *, bound: float, patience: int) -> None:
        self.drift = 0.0
        self._names = tuple(names)
        self._bound = bound
        self._patience = patience
        self._reference: Tensor | None = None
        self._reference_step = 0
        self._beyond = 0

    def set_reference(self, step: int, histogram: Tensor) -> None:
        """Set the histogram (C,) after this step as the reference for later ones."""
        histogram = histogram.to("cpu", torch.float64, copy=True)
        if histogram.sum() > 0:
            self._reference = histogram
            self._reference_step = step

    def check(self, step: int, histogram: Tensor) -> float:
        """Compare the histogram (C,) after a step with the reference.

        All workers must pass the same, summed histogram, so that all of them raise, or none.

        Returns:
            The change, also stored in ``drift``; 0 without a reference.

        Raises:
            MaskMillError: ``self_training_collapsed`` after ``patience`` consecutive steps beyond the bound.
        """
        if self._reference is None:
            return self.drift
        histogram = histogram.double().cpu()  # all that the host reads of a GPU here
        if not histogram.sum() > 0:
            return self.drift
        self.drift = relative_change(self._reference, histogram)
        self._beyond = self._beyond + 1 if self.drift > self._bound else 0
        if self._beyond >= self._patience:
            raise self._collapsed(step, self._reference, histogram)
        return self.drift

    def state_dict(self) -> dict[str, Any]:
        """State for ``load_state_dict``: plain tensors and numbers."""
        state: dict[str, Any] = {
            "drift": self.drift,
            "beyond": self._beyond,
            "reference_step": self._reference_step,
        }
        if self._reference is not None:
            state["reference"] = self._reference
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the result of ``state_dict``."""
        reference = state.get("reference")
        self.drift = float(state["drift"])
        self._beyond = int(state["beyond"])
        self._reference_step = int(state["reference_step"])
        self._reference = None if reference is None else reference.to("cpu", torch.float64, copy=True)

    def _collapsed(self, step: int, before: Tensor, now: Tensor) -> MaskMillError:
        before, now = before / before.sum(), now / now.sum()
        parts: dict[str, list[tuple[float, str]]] = {"Vanished": [], "Shrunk": [], "Grown": []}
        for name, old, new in zip(self._names, before.tolist(), now.tolist(), strict=True):
            if not old / _NOTABLE <= new <= old * _NOTABLE:
                kind = "Grown" if new > old else "Vanished" if new < _VANISHED * old else "Shrunk"
                parts[kind].append((abs(new - old), f"{name} {old:.1%} to {new:.1%}"))
        listed = " ".join(
            f"{kind}: {', '.join(text for _, text in sorted(changes, reverse=True)[:_LISTED])}"
            f"{' and others' if len(changes) > _LISTED else ''}."
            for kind, changes in parts.items()
            if changes
        )
        return FailedWork(
            "self_training_collapsed",
            f"Self-training was stopped at step {step}: the shares of the classes that the student predicts "
            f"have changed by {self.drift:.0%} on average since step {self._reference_step}, the end of the "
            f"guided phase, and by more than {self._bound:.0%} for {self._beyond} steps. {listed}",
            f"The student of step {self._reference_step} is sound, and is kept. To train another one, into "
            "another --output: anchor it to its teacher (anchor=1), let it learn from its running average "
            "(ema_decay=0.98), leave self_class_power at 0, or lower the learning rate. Raise drift_bound "
            "only if such a change is expected.",
        )
