from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from pipeline.cluster.collector import collect_rarely, without_collection


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    enabled, thresholds = gc.isenabled(), gc.get_threshold()
    yield
    gc.set_threshold(*thresholds)
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was_afterwards(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with pytest.raises(ImportError), without_collection():
        assert not gc.isenabled()
        raise ImportError("it is not there")
    assert gc.isenabled() == enabled


def test_collection_becomes_rare_but_does_not_end() -> None:
    before = 700, 10, 10
    gc.set_threshold(*before)
    collect_rarely()
    assert gc.isenabled()
    assert 10 * before[0] < gc.get_threshold()[0] < 1_000_000
