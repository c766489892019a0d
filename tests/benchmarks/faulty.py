"""A kind of input for the fuzzer whose faults are known."""

from __future__ import annotations

import os
import random
import signal
import time
from typing import ClassVar

from benchmarks.fuzz.kind import Kind
from models.errors import WrongUse

FAULTS = ("ok", "refused", "no words", "exception", "crash", "hang", "memory")


class Faulty(Kind):
    seconds: ClassVar[float] = 5.0
    memory_mb: ClassVar[int] = 300

    @classmethod
    def make(cls, rng: random.Random) -> bytes:
        return rng.choice(FAULTS).encode()

    def check(self, data: bytes, rng: random.Random) -> str:
        match data.decode():
            case "refused":
                raise WrongUse("file_invalid", "It cannot be read.", "Write it again.")
            case "no words":
                raise WrongUse("file_invalid", "cannot read <_io.BytesIO object at 0x7f>", "Write it again.")
            case "exception":
                raise KeyError("categories")
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "hang":
                time.sleep(60)
            case "memory":
                self.hoard = bytes([1]) * 400_000_000
        return "read"


KIND = Faulty
