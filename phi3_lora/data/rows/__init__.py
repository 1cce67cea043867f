"""Rows of data as checked conversations."""
