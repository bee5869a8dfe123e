"""Modules on top of embeddings: classifiers written in words or fitted to labels."""
