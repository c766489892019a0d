"""The benchmarks behind ``maskmill benchmark``, one module per family of tables."""
