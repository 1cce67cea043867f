"""Checks and repairs of a text's encoding and white space."""

from __future__ import annotations

import re
import unicodedata

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ODD_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f]")
"""Spaces of typography; not U+3000, which is the space of Chinese and Japanese."""
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
"""Soft hyphen, zero-width space, word joiner, byte order mark; joiners that scripts need stay."""
_MISREAD = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac.")
"""UTF-8 read as Windows-1252: an accented letter, a quotation mark or a dash."""
_MARKER = re.compile(
    r"<\|[\w.-]{1,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>", re.IGNORECASE
)
"""Markers of chat templates: Phi, ChatML, Llama 2 and 3, Mistral, Gemma."""


def encoding_problem(text: str) -> str | None:
    """Return the problem of a text's encoding, if it has one."""
    control = _CONTROL.search(text)
    if control is not None:
        return f"control character U+{ord(control.group()):04X}"
    if text.isascii():
        return None
    if "\ufffd" in text:
        return "U+FFFD, which stands for a character that was lost before"
    misread = _MISREAD.search(text)
    if misread is not None:
        return f"UTF-8 that was read as Windows-1252 ({misread.group()!r})"
    return None if unicodedata.is_normalized("NFC", text) else "not in Unicode NFC"


def repaired(text: str) -> str:
    """Text in Unicode NFC without control characters; what was lost or misread stays."""
    return unicodedata.normalize("NFC", _CONTROL.sub("", text))


def white_space_problem(text: str) -> str | None:
    """Return the problem of a text's white space, if it has one."""
    if text.strip() and text != text.strip():
        return "white space at its start or end"
    if "\r" in text:
        return "line ends of Windows or old Macs (carriage return)"
    odd = None if text.isascii() else _ODD_SPACE.search(text) or _INVISIBLE.search(text)
    return None if odd is None else f"odd or invisible space U+{ord(odd.group()):04X}"


def tidied(text: str) -> str:
    """Text with plain spaces and line ends, and none at its ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _INVISIBLE.sub("", _ODD_SPACE.sub(" ", text)).strip()


def marker_in(text: str) -> str | None:
    """The first marker of a chat template that a text holds as text."""
    match = _MARKER.search(text) if "<" in text or "[" in text else None
    return None if match is None else match.group()
