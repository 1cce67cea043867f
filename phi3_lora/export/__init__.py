"""Merging of adapters into models, and files for llama.cpp and Ollama."""
