"""CLIP-Refine: shared random references and hybrid self-distillation after pre-training."""
