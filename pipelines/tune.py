"""A search over settings of `align`, as a Ray job; same options as `recray tune`. Run again, it goes on.

ray job submit --working-dir . -- python -m pipelines.tune --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("tune")
