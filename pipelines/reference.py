"""Scores under the frozen SFT model, as a Ray job; same options as `recray reference`.

ray job submit --working-dir . -- python -m pipelines.reference --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("reference")
