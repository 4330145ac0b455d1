"""Pure loss functions of arrays; they import jax alone."""
