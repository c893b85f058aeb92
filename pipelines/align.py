"""Preference optimisation, as a Ray job; same options as `recray align`.

ray job submit --working-dir . -- python -m pipelines.align --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("align")
