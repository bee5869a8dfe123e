"""Captions that are wrong in one word or in its place, and the loss that learns from them (NegCLIP)."""
