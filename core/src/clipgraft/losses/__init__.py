"""Training objectives that a stage names in its config."""
