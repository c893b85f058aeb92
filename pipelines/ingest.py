"""Logs and catalogue into one schema, as a Ray job; same options as `recray ingest`.

ray job submit --working-dir . -- python -m pipelines.ingest --recipe movielens --data PATH --workspace URI
"""

from recray.cli import main

if __name__ == "__main__":
    main("ingest")
