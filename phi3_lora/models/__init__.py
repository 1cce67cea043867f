"""The Phi-3 family: configuration, weights, quantisation."""
