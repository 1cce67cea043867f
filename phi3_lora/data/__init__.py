"""Data: rows of conversations, read and encoded as token ids with a loss mask."""
