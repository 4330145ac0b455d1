"""The loop, the step, the optimizer, checkpoints and devices."""
