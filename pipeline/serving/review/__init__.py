"""The page on which people review labels, and the API behind it."""
