"""``maskmill retrain``: from new images to a promoted model, a step after the other."""
