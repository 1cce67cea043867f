"""Proof that a chat template's text around contents depends on the roles alone.

The template runs once on contents that it can only join and write out. If the template reads
anything else (a length, a word, an equality), there is no proof, and every row is rendered in full.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NoReturn

import jinja2
from jinja2 import nodes

from phi3_lora.data.rows.conversation import Message

_PLAIN_NODES = (
    nodes.Template,
    nodes.Output,
    nodes.TemplateData,
    nodes.Const,
    nodes.Name,
    nodes.NSRef,
    nodes.List,
    nodes.Tuple,
    nodes.Keyword,
    nodes.For,
    nodes.If,
    nodes.Assign,
    nodes.Getitem,
    nodes.Getattr,
    nodes.Slice,
    nodes.Add,
    nodes.Sub,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.CondExpr,
    nodes.Continue,
    nodes.Break,
)
"""Nodes that cannot turn a content into a string, except to write it out."""
_PLAIN_CALLS = ("raise_exception", "namespace", "range")
_PLAIN_FILTERS = ("length", "count")
_PLAIN_TESTS = ("defined", "undefined", "none")


def only_places(parsed: nodes.Template) -> bool:
    """Return whether a template has only nodes whose reading of a content can be detected.

    Most filters, the operator ~ and methods of strings first convert a content to a plain string,
    whose later use cannot be detected.
    """
    return all(_is_plain(node) for node in parsed.find_all(nodes.Node))


def _is_plain(node: nodes.Node) -> bool:
    if isinstance(node, nodes.Call):
        return isinstance(node.node, nodes.Name) and node.node.name in _PLAIN_CALLS
    if isinstance(node, nodes.Test):
        return node.name in _PLAIN_TESTS
    if isinstance(node, nodes.Filter):
        return node.name in _PLAIN_FILTERS
    if isinstance(node, nodes.Mod):
        # On a string, % inserts a content; on a number it is a remainder.
        return isinstance(node.right, nodes.Const) and isinstance(node.right.value, int)
    return isinstance(node, _PLAIN_NODES)


def literals_around(
    render: Callable[[Sequence[Message]], str], roles: Sequence[str], mark: str
) -> list[str] | None:
    """Return the text around contents, if it is the same for all contents of these roles.

    Args:
        render: runs a template for which only_places is true.
        roles: roles of the messages; each message has a role and a content only.
        mark: a character that the template does not hold.

    Returns:
        The text before, between and after the contents, one more than there are messages; None
        without a proof.
    """
    messages: list[Message] = [
        {"role": role, "content": _Opaque([f"{mark}{i}{mark}"])} for i, role in enumerate(roles)
    ]
    try:
        text = render(messages)
    except (_ObservedError, jinja2.TemplateError, TypeError, ValueError, LookupError):
        return None
    parts = re.split(f"{mark}([0-9]+){mark}", text)
    if parts[1::2] != [str(i) for i in range(len(roles))]:
        return None
    return parts[::2]


class _ObservedError(Exception):
    """Error raised when a template reads a content."""


class _Opaque:
    """A content that is not empty and can only be joined to text or written out."""

    def __init__(self, parts: list[str]) -> None:
        self._parts = parts

    def __bool__(self) -> bool:
        return True

    def __add__(self, other: object) -> _Opaque:
        return _Opaque([*self._parts, *_parts_of(other)])

    def __radd__(self, other: object) -> _Opaque:
        return _Opaque([*_parts_of(other), *self._parts])

    def __str__(self) -> str:
        return "".join(self._parts)

    def _observed(self, *_: object) -> NoReturn:
        raise _ObservedError

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _observed
    __hash__ = __len__ = __iter__ = __contains__ = __getitem__ = _observed
    __index__ = __int__ = __float__ = __repr__ = __format__ = __call__ = _observed
    __mul__ = __rmul__ = __mod__ = __rmod__ = __sub__ = __rsub__ = _observed


def _parts_of(value: object) -> list[str]:
    if isinstance(value, _Opaque):
        return value._parts
    if isinstance(value, str):
        return [value]
    raise TypeError("can only join text to text")
