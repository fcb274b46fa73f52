"""Readers of a run: terminal table, Markdown, CSV."""
