"""Reading of conversations, and their encoding as token ids with a loss mask."""
