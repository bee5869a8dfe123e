"""Segmentation by words and by prompts: measured on any encoder, drawn side by side."""
