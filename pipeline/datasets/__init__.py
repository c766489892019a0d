"""Readers for benchmark datasets in their published layouts, and the papers' evaluation protocols."""
