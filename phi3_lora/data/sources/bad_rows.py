"""Collection of rows that cannot be used: it counts them, and refuses or notes them."""

from __future__ import annotations

from typing import NamedTuple

from phi3_lora.data.options import OnBadRow
from phi3_lora.data.rows.conversation import BadRow
from phi3_lora.errors import MAX_SHOWN, DataError, listing


class Advice(NamedTuple):
    """The parts of messages on bad rows that depend on the command."""

    remedy: str
    """Text after `correct or remove them`."""
    left_out: str = "skipped"
    """First words of the note on bad rows that are left out."""


TRAINING = Advice(" (train and evaluate can leave them out: --on-bad-row skip)")
STREAMING = Advice(" (or leave them out: --on-bad-row skip)")
REWRITING = Advice(
    " (phi3-lora data check lists them), or leave them out with --set data.on_bad_row=skip",
    "left out",
)


class BadRows:
    """The bad rows of some sources: their number and the first of them."""

    def __init__(self, policy: OnBadRow, advice: Advice) -> None:
        """Start without a bad row.

        Args:
            policy: error refuses bad rows, skip leaves them out.
            advice: parts of the messages.
        """
        self.count = 0
        self.first: list[str] = []
        """The first bad rows, each as `file:line: reason`."""
        self._policy = policy
        self._advice = advice

    def add(self, row: BadRow) -> None:
        """Count a bad row, and keep it if it is among the first."""
        self.count += 1
        if self.count <= MAX_SHOWN:
            self.first.append(str(row))

    @property
    def must_be_refused(self) -> bool:
        """True if there is a bad row and the policy is error."""
        return self.count > 0 and self._policy == "error"

    def refuse(self, where: str) -> None:
        """Refuse the rows if the policy says so.

        Args:
            where: the place of the rows, for example `in rows.jsonl`.

        Raises:
            DataError: when there is a bad row and the policy is error.
        """
        if self.must_be_refused:
            title = f"{self.count:,} bad row(s) {where}; correct or remove them"
            raise DataError(self._listed(f"{title}{self._advice.remedy}:"))

    def notes(self, num_good: int, names: str) -> list[str]:
        """Return the note on rows that are left out, if there are any.

        Args:
            num_good: usable rows.
            names: the sources of all rows.
        """
        if not self.count:
            return []
        total = self.count + num_good
        title = f"{self._advice.left_out} {self.count:,} bad row(s) of {total:,} in {names}:"
        return [self._listed(title)]

    def _listed(self, title: str) -> str:
        return listing(title, self.first, total=self.count)
