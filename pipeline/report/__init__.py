"""Pages and pictures of label tables, results and training runs."""
