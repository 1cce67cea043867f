"""Chat templates and tokenizers: conversations as token ids with a loss mask."""
