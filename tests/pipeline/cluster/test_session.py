from __future__ import annotations

import signal
from typing import Any, NoReturn

import pytest
import ray

from models.errors import MaskMillError
from pipeline.cluster.session import ray_session


@pytest.mark.slow
def test_a_session_leaves_signals_and_the_ray_of_others_alone() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with ray_session("mine", address=None, verbose=False):
        assert {number: signal.getsignal(number) for number in before} == before
        with (
            pytest.raises(MaskMillError, match="twice") as refused,
            ray_session("another", address=None, verbose=False),
        ):
            pass
        assert refused.value.code == "cluster_unreachable"
        assert ray.get(ray.put("still there")) == "still there"
    assert not ray.is_initialized()


def test_a_start_that_times_out_is_told_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(*_arguments: Any, **_settings: Any) -> NoReturn:
        raise Exception("The current node timed out during startup.")  # as Ray raises it

    monkeypatch.setattr(ray, "init", time_out)
    with (
        pytest.raises(MaskMillError, match="timed out during startup") as caught,
        ray_session("mine", address=None, verbose=False),
    ):
        pass
    assert caught.value.code == "cluster_unreachable"


def test_a_cluster_that_is_not_there_is_told_at_once() -> None:
    with (
        pytest.raises(MaskMillError, match=r"127\.0\.0\.1:1") as caught,
        ray_session("mine", address="127.0.0.1:1", verbose=False),
    ):
        pass
    assert caught.value.code == "cluster_unreachable" and "--address" in caught.value.remedy
