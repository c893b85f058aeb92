"""The language model learns catalogue and histories, as a Ray job; same options as `recray sft`.

ray job submit --working-dir . -- python -m pipelines.sft --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("sft")
