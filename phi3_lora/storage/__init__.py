"""Files on the disk: atomic writes, caches, JSON, safetensors, optional packages."""
