"""Reinforced training after MobileCLIP: teachers' embeddings of replayable crops, stored once."""
