"""Comparisons: between backends, after a conversion, with where an adapter was trained."""
