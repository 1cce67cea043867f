"""Entry names of zip archives, which distinguish a .pt file from an .npz."""

from __future__ import annotations

import zipfile
from pathlib import Path

from phi3_lora.errors import AdapterError


def entry_names(path: Path) -> list[str]:
    """Return the names in a zip archive; an empty list if the file does not start as one.

    Raises:
        AdapterError: when the file starts as an archive but is damaged.
    """
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return []
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError) as cause:
        raise AdapterError(f"{path} is not a complete archive: {cause}") from None
