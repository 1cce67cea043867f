"""The result of a data check: problems with file and line, lengths, share of the loss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

KINDS = (
    *("bad-row", "empty", "no-loss", "too-short", "too-long", "leak", "duplicate"),
    *(
        "near-duplicate",
        "system-lost",
        "marker-text",
        "encoding",
        "whitespace",
        "pattern",
        "language",
    ),
)
"""Every kind of problem, in the order of counts."""
_MOST_BINS = 12
_WIDTHS = [digit * 10**power for power in range(12) for digit in (1, 2, 5)]


class Problem(NamedTuple):
    """One problem of one row."""

    file: str
    line: int
    kind: str
    message: str

    def __str__(self) -> str:
        """Return the place, the kind and the message, as messages list them."""
        return f"{self.file}:{self.line}: {self.kind}: {self.message}"


class Lengths(NamedTuple):
    """The lengths of rows."""

    unit: str
    """tokens or characters."""
    values: NDArray[np.int64]
    """(rows,) length of each row."""

    def histogram(self) -> list[tuple[int, int, int]]:
        """Return the least length, greatest length and number of rows of each bin.

        All bins have one round width. If lengths differ by a factor of 8 or more, the edges are
        powers of two.
        """
        if not len(self.values):
            return []
        least, greatest = int(self.values.min()), int(self.values.max())
        if greatest >= 8 * max(least, 1):
            powers = range(least.bit_length(), greatest.bit_length() + 1)
            edges = [2**p // 2 for p in powers] + [2 ** powers[-1]]
        else:
            width = next(w for w in _WIDTHS if greatest // w - least // w < _MOST_BINS)
            edges = list(range(least // width * width, greatest + width + 1, width))
            edges = [edge for edge in edges if edge - width <= greatest]
        counts = np.histogram(self.values, [*edges[:-1], edges[-1] - 0.5])[0].tolist()
        return [(a, b - 1, n) for a, b, n in zip(edges, edges[1:], counts, strict=False)]

    def to_dict(self) -> dict[str, Any]:
        """Return unit, minimum, median, 95th percentile, maximum, mean and histogram."""
        quantiles = [0.0] * 4
        if len(self.values):
            # inverted_cdf takes the greater of two lengths: at least 95 % are not longer.
            middle, high = (
                np.quantile(self.values, 0.5),
                np.quantile(self.values, 0.95, method="inverted_cdf"),
            )
            quantiles = [self.values.min(), middle, high, self.values.max()]
        names = ("min", "median", "p95", "max")
        return {
            "unit": self.unit,
            **{name: float(q) for name, q in zip(names, quantiles, strict=True)},
            "mean": float(self.values.mean()) if len(self.values) else 0.0,
            "histogram": [{"from": a, "to": b, "rows": n} for a, b, n in self.histogram()],
        }


@dataclass(slots=True)
class Report:
    """The result of a data check."""

    files: list[str]
    num_rows: int
    """Number of usable rows of training and validation data."""
    num_valid_rows: int
    problems: list[Problem]
    lengths: Lengths
    near_duplicates: bool
    """True if near duplicates were looked for."""
    num_tokens: int | None = None
    """Tokens of all rows; None without a model."""
    loss_tokens: int | None = None

    def counts(self) -> dict[str, int]:
        """Return kind -> number of problems, for the kinds that occur."""
        found = Counter(p.kind for p in self.problems)
        return {kind: found[kind] for kind in KINDS if kind in found}

    @property
    def loss_share(self) -> float | None:
        """Share of all tokens that are in the loss; None without a model or a token."""
        if not self.num_tokens or self.loss_tokens is None:
            return None
        return self.loss_tokens / self.num_tokens

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "files": self.files,
            "num_rows": self.num_rows,
            "num_valid_rows": self.num_valid_rows,
            "counts": self.counts(),
            "problems": [p._asdict() for p in self.problems],
            "lengths": self.lengths.to_dict(),
            "near_duplicates": self.near_duplicates,
            "num_tokens": self.num_tokens,
            "loss_tokens": self.loss_tokens,
            "loss_share": self.loss_share,
        }


def spread(problems: Sequence[Problem], limit: int) -> list[Problem]:
    """Choose at most `limit` problems, about equally many of each kind, in their order."""
    places: dict[str, list[int]] = {}
    for i, problem in enumerate(problems):
        places.setdefault(problem.kind, []).append(i)
    by_turn = sorted((turn, i) for found in places.values() for turn, i in enumerate(found))
    return [problems[i] for i in sorted(i for _, i in by_turn[:limit])]
