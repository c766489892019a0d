from __future__ import annotations

from tests.jobs.conftest import maskmill_environment, maskmill_here, maskmill_joined

__all__ = ["maskmill_environment", "maskmill_here", "maskmill_joined"]
