"""Reinforcement learning for vision-language models on hour-long videos, in JAX."""
