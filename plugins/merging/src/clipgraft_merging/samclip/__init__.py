"""SAM-CLIP (Wang et al., arXiv 2310.15308): one image tower with SAM's masks and CLIP's meaning."""
