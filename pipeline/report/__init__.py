"""Pages and pictures of label tables, results and trainings."""
