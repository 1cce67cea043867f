"""Check and repair of a text's encoding and white space."""

from __future__ import annotations

import re
import unicodedata

_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_ODD_SPACE = re.compile("[\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f]")
"""Typographic spaces, without U+3000, the space of Chinese and Japanese."""
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
"""Soft hyphen, zero-width space, word joiner, byte order mark; not the joiners of some scripts."""
_MISREAD = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac.")
"""UTF-8 read as Windows-1252: an accented letter, a quotation mark or a dash."""
_MARKER = re.compile(
    r"<\|[\w.-]{1,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>", re.IGNORECASE
)
"""Markers of chat templates: Phi, ChatML, Llama 2 and 3, Mistral, Gemma."""


def encoding_problem(text: str) -> str | None:
    """Return the problem of a text's encoding; None if there is none."""
    control = _CONTROL.search(text)
    if control is not None:
        return f"control character U+{ord(control.group()):04X}"
    if text.isascii():
        return None
    if "\ufffd" in text:
        return "U+FFFD, which replaces a character that was lost earlier"
    misread = _MISREAD.search(text)
    if misread is not None:
        return f"UTF-8 that was read as Windows-1252 ({misread.group()!r})"
    return None if unicodedata.is_normalized("NFC", text) else "not in Unicode NFC"


def repaired(text: str) -> str:
    """Return a text in Unicode NFC without control characters; lost or misread characters stay."""
    return unicodedata.normalize("NFC", _CONTROL.sub("", text))


def white_space_problem(text: str) -> str | None:
    """Return the problem of a text's white space; None if there is none."""
    if text.strip() and text != text.strip():
        return "white space at its start or end"
    if "\r" in text:
        return "line ends of Windows or old Macs (carriage return)"
    odd = None if text.isascii() else _ODD_SPACE.search(text) or _INVISIBLE.search(text)
    return None if odd is None else f"odd or invisible space U+{ord(odd.group()):04X}"


def tidied(text: str) -> str:
    """Return a text with plain spaces and line ends, and no white space at its ends."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return _INVISIBLE.sub("", _ODD_SPACE.sub(" ", text)).strip()


def marker_in(text: str) -> str | None:
    """Return the first marker of a chat template in a text; None if there is none."""
    match = _MARKER.search(text) if "<" in text or "[" in text else None
    return None if match is None else match.group()
