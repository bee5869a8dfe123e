"""Default settings of the core's recipes."""
