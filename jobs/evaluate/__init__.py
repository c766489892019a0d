"""``maskmill evaluate``: the command, the comparison, the protocol it follows, and what it prints."""
