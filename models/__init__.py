"""What computes: pure PyTorch, usable on its own in a notebook. Never imports Ray or MLflow."""
