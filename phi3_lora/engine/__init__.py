"""The border between the core and a backend, and what backends share."""
