"""The papers' claims at toy scale."""
