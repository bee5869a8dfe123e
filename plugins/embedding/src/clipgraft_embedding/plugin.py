"""The manifest of ``embedding``."""

from __future__ import annotations
