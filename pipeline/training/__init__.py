"""Training on Ray Train: one loop, and the tasks that it trains."""
