"""Models to measure; the only floor that imports transformers."""
