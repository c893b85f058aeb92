"""The whole job, as a Ray job; same options as `recray run`.

ray job submit --working-dir . -- python -m pipelines.run --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("run")
