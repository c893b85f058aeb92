"""What people submit to Ray: one thin script a stage, `run` for all of them, and the recipes.

ray job submit --working-dir . -- python -m pipelines.run --recipe movielens --data PATH --workspace URI
"""
