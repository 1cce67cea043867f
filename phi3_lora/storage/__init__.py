"""Files on disk: atomic writes, caches, JSON and safetensors; and optional packages."""
