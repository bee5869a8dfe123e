"""Task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089): what fine-tuning changed, added and subtracted."""
