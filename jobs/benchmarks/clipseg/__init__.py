"""CLIPSeg's tables (arXiv 2112.10003)."""
