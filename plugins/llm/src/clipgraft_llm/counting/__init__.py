"""Teaching CLIP to count: captions against the same captions with another number."""
