"""Training: one loop, and the two tasks that it trains."""
