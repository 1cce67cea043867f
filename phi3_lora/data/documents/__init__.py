"""Rows encoded as documents: kept, counted, cached, streamed."""
