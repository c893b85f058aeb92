"""Methods of alignment side by side, as a Ray job; same options as `recray compare`.

ray job submit --working-dir . -- python -m pipelines.compare --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("compare")
