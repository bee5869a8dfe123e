"""One of two distributions that claim one plugin name; neither may be imported."""

raise SystemExit("imported")
