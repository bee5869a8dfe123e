import torch

torch.set_num_threads(1)  # tensors this small are faster on one thread, and goldens don't depend on the machine
