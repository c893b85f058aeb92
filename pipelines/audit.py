"""Rules that need no model, before any model, as a Ray job; same options as `recray audit`.

ray job submit --working-dir . -- python -m pipelines.audit --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("audit")
