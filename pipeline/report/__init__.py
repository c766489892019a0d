"""Pages and pictures of what was made."""
