"""Faults from inside a run: Python executes this first in each process whose PYTHONPATH has this folder.

Environment:
    FAULTS_SKEW_S: by how much the wall clock is ahead, as our code reads it.
    FAULTS_PACE_S: how long opening an image takes in Ray's workers, so that there is time to be disturbed.

In Ray's workers, an image that is grey all over kills the process that decodes it or computes its labels, if
its grey value is ``DECODE_POISON`` or ``LABEL_POISON``.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

DECODE_POISON = 200
LABEL_POISON = 201
OURS = ("jobs.", "pipeline.", "models.")


SKEW_S = float(os.environ.get("FAULTS_SKEW_S") or 0)
_now = time.time


def time_with_skew() -> float:
    """``time.time``, with the skew for our code only: Ray's compiled parts read another clock.

    A function of a module, so that what holds it can be pickled.
    """
    frame = inspect.currentframe()
    caller = frame.f_back if frame else None
    ours = caller is not None and caller.f_globals.get("__name__", "").startswith(OURS)
    return _now() + (SKEW_S if ours else 0)


def _poison(pace_s: float) -> None:
    import numpy as np
    from PIL import Image

    open_image, stack = Image.open, np.stack

    def opened(*arguments: Any, **settings: Any) -> Any:
        time.sleep(pace_s)
        image = open_image(*arguments, **settings)
        if image.convert("L").getextrema() == (DECODE_POISON, DECODE_POISON):
            os.kill(os.getpid(), signal.SIGKILL)
        return image

    def stacked(arrays: Any, *arguments: Any, **settings: Any) -> Any:
        # This is how a Labeller makes a batch of images.
        if (
            len(arrays)
            and getattr(arrays[0], "dtype", None) == np.uint8
            and (arrays[0] == LABEL_POISON).all()
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        return stack(arrays, *arguments, **settings)

    Image.open, np.stack = opened, stacked


if SKEW_S:
    import inspect

    time.time = time_with_skew
if any("default_worker" in word for word in sys.orig_argv):
    _poison(float(os.environ.get("FAULTS_PACE_S") or 0))
