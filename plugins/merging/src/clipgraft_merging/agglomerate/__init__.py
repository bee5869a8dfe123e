"""Many teachers in one image tower: AM-RADIO (arXiv 2312.06709) with PHI-S normalisation (arXiv 2410.01680)."""
