"""Negatives of every example, as a Ray job; same options as `recray negatives`.

ray job submit --working-dir . -- python -m pipelines.negatives --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("negatives")
