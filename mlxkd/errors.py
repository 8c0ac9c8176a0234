"""The one exception that reaches people: what was wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the person can mend. Commands print it and exit with code 2.

    Args:
        what: the fault in one sentence, with the offending value.
        where: file, ``file:line`` or recipe key it was found at.
        hint: the next thing to do, ideally a command.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None):
        self.what, self.where, self.hint = what, where, hint
        super().__init__(self.__str__())

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return f"{head}\nhint: {self.hint}" if self.hint else head


def unknown(kind: str, name: str, known: Iterable[str], *, where: str | None = None) -> UserError:
    """An error for a name that is not in a listing, naming the nearest known one."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {kind} {name!r}", where=where, hint=f"{hint}known: {', '.join(known)}")
