"""python -m longrl_jax.evaluate"""

from longrl_jax.evaluate import main

if __name__ == "__main__":
    main()
