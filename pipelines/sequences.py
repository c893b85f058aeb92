"""Histories and splits, as a Ray job; same options as `recray sequences`.

ray job submit --working-dir . -- python -m pipelines.sequences --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("sequences")
