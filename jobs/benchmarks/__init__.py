"""The benchmarks of ``maskmill benchmark``, one module for each family of tables."""
