"""Counts instead of repetition: what was noticed about many files is said in one line a kind."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field


@dataclass
class Notes:
    """Collects remarks about files and says each kind once.

    Attributes:
        names: The files' names, by remark.
    """

    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, remark: str, name: str) -> None:
        """Notes a remark (a predicate such as ``hold 16-bit pixels``) about a file."""
        self.names.setdefault(remark, []).append(name)

    def log(self, logger: logging.Logger, total: int, noun: str = "images") -> None:
        """Logs one warning a remark: how many of ``total``, and the first name."""
        for remark, names in self.names.items():
            logger.warning("%d of %d %s %s (first: %s).", len(names), total, noun, remark, names[0])
