"""Settings: the fields, where they come from, and what each known name means."""
