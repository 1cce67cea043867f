"""Comparisons: of backends, of conversions, and of an adapter here and where it was trained."""
