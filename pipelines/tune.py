"""A search over margin and number of negatives, as a Ray job; same options as `recray tune`.

ray job submit --working-dir . -- python -m pipelines.tune --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("tune")
