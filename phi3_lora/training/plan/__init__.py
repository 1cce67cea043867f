"""Which documents form which optimizer step."""
