"""A base model with its adapter in the files of other tools."""
