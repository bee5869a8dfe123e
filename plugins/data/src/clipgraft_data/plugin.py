"""The manifest of ``data``."""

from __future__ import annotations
