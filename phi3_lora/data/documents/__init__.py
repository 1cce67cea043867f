"""Encoded rows: selection, counts, cache and stream of documents."""
