"""What can be trained: each task gives the loop its phases, losses and optimiser groups."""
