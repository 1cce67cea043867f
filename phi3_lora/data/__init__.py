"""From files of conversations to documents: token ids with a loss mask."""
