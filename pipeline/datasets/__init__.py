"""Benchmark datasets as their authors publish them, and the protocols that papers measure them with."""
