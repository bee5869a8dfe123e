"""Encoders: one function opens any model reference."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipgraft.encoders.base import Encoder
    from clipgraft.registry import Registry


def load(uri: str, *, registry: Registry | None = None) -> Encoder:
    """Open ``open_clip:ARCH[/TAG]``, ``local-dir:DIR``, ``hf-hub:ORG/NAME``, ``hf:ORG/NAME``, a folder, or a plugin's.

    A registered name (``plugin/encoder``) comes before a folder of that name (write ``./plugin/encoder``); what
    nothing here recognises is offered to the plugins' ``clipgraft_open``.
    """
    from clipgraft.encoders.sources import open_reference

    return open_reference(uri, registry=registry)
