"""Rows to stream in tests of whole runs."""

from __future__ import annotations

from tests.tiny import chat

ROWS = [chat(f"question {i}", f"answer {i * 7 % 11}") for i in range(40)]
