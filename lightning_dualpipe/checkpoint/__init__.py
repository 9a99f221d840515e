"""Checkpoints of the whole model, whatever it was cut into."""
