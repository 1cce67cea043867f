"""Checking, cleaning and splitting data."""
