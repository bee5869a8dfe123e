"""TIES (Yadav et al., NeurIPS 2023, arXiv 2306.01708): trim task vectors, elect signs, average what agrees."""
