"""From a folder of videos to LongVideo-Reason: python -m longrl_jax.data.generate.

Every film passes eight stages; each leaves one file a film (work.py). What a stage asks a server is
a generator over rounds of requests, so that those of many films are asked together. The guide is
docs/generate.md.
"""
