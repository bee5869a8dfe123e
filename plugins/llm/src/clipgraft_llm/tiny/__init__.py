"""TinyCLIP: a smaller CLIP from the weights of a larger one, taught by its affinities."""
