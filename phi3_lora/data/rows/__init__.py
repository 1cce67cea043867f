"""Rows of data sets, read as checked conversations."""
