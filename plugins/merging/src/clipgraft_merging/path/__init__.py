"""What happens between two models: accuracy along the line, block by block, and how sharp blocks are (ours)."""
