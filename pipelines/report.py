"""The report, as a Ray job; same options as `recray report`.

ray job submit --working-dir . -- python -m pipelines.report --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("report")
