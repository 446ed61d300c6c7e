"""What a config needs of a device, told ahead of time: python -m longrl_jax.plan."""
