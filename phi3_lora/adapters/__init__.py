"""Adapters as numpy tensors under PEFT's names, and the file layouts of other tools."""
