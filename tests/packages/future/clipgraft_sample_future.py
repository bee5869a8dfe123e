"""A manifest of another API major, which must not be imported."""

raise SystemExit("imported")
