"""Quantised bases on grids that every backend reads alike."""
