"""The values that options of a data set can have."""

from __future__ import annotations

OVERLONG = ("refuse", "drop", "truncate")
ON_BAD_RECORD = ("error", "skip")
TRUNCATION_METHODS = ("left", "right")
