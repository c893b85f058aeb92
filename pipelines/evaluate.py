"""Ranking on the test split, as a Ray job; same options as `recray evaluate`.

ray job submit --working-dir . -- python -m pipelines.evaluate --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("evaluate")
