"""Find, refuse and open checkpoints, and the text that goes with them."""
