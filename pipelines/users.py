"""SASRec and its vectors, as a Ray job; same options as `recray users`.

ray job submit --working-dir . -- python -m pipelines.users --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("users")
