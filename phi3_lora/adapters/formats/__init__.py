"""Adapter formats, each with its reader and writer."""
