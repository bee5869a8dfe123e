"""SAM's parts as plain modules: the image tower at any size, prompt encoder and mask decoder, and how to open them."""
