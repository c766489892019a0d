"""The papers' claims at toy scale, on the toy world."""
