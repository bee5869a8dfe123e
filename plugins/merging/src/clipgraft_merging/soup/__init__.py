"""Model soups (Wortsman et al., ICML 2022, arXiv 2203.05482): the mean of fine-tuned models."""
