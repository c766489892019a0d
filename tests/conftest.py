from __future__ import annotations

import os

import hypothesis
import pytest

# Ray's workers usually stand far back (15) behind all else on a machine. Here that is other tests, beside
# which they would get nothing; but a Ray that starts goes first, as it gives up after some seconds.
os.environ.setdefault("RAY_worker_niceness", "5")

# Machines are shared, if only by the tests that run side by side: how long an example takes shows nothing.
hypothesis.settings.register_profile(
    "shared", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared")

LONGEST = ("test_label_kills.py", "test_train.py", "test_label.py", "test_loop.py")
"""Files that take minutes, those that take most first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, so that at the end no process works on one while the others have nothing to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def rank(item: pytest.Item) -> int:
        if item.path.name in LONGEST:
            return LONGEST.index(item.path.name)
        return len(LONGEST) + (item.path not in slow)

    items.sort(key=rank)
