"""Quantised base models on grids that give equal numbers on every backend."""
