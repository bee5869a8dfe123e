"""A manifest that fails at import."""

raise RuntimeError("this manifest always fails")
