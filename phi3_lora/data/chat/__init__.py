"""Chat templates and tokenizers: encoding of conversations as token ids with a loss mask."""
