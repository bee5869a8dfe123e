"""Configuration: typed, frozen, closed, written out in full."""
