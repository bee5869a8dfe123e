"""WiSE-FT (Wortsman et al., CVPR 2022, arXiv 2109.01903): the line between a model and its fine-tuned version."""
