"""People look at labels: which ones first, what they say of them, and how well they agree with the truth."""
