"""A small web page and API that show what models find in an image."""
