"""Checking, cleaning and splitting of data."""
