"""The first thing on a GPU node: does every part work here? python -m longrl_jax.check."""
