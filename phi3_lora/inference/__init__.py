"""Scoring and generation with a base model and an adapter."""
