"""The manifest of ``evaluation``.

It offers no component: ``clipgraft report``, ``demo`` and ``claims`` call ``report.write_report`` and
``claims.claim_plot`` of this package when the registry finds it in use.
"""

from __future__ import annotations
