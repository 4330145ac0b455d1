"""Similarities, mixing, ranking and views: functions of arrays on jax alone."""
