"""A small web page and API that run models on an image."""
