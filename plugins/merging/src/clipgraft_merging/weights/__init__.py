"""The engine of everything that merges weights: lazy checkpoints, one tensor at a time, written as they come."""
