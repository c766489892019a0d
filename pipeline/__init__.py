"""What flows: manifests, images, label tables, and the stages between them."""
