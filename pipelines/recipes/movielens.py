"""MovieLens in its `interactions` and `items` tables: ml-latest-small is what the settings were chosen on."""

from recray.config import Align, Ingest, LanguageModel, Negatives, Optimiser, Pipeline, Sequences, Sft, Users


def movielens() -> Pipeline:
    """MovieLens ratings, split at one moment for all users (the honest split)."""
    return Pipeline(
        name="movielens",
        # Every rating counts as an interaction, a low one too: one rates what one chose to watch, and which
        # film comes next is what is predicted here. `--set ingest.min_rating=4` keeps liked films only.
        ingest=Ingest(min_rating=None, min_user_interactions=5, min_item_interactions=3),
        sequences=Sequences(
            split="time_cut",
            validation_fraction=0.1,
            test_fraction=0.1,
            # With one cut for all, few users (the late ones) hold many held-out rows: keep enough of each for
            # narrow intervals, which are clustered by user.
            targets_per_user=60,
            examples_per_user=20,
            num_candidates=100,
        ),
        users=Users(dim=64, passes=40, patience=6),
        # On a log this small and dense what goes together says more than what follows what: windows of shuffled
        # histories teach it, in many passes (twice as many overfit), and better with some random items in them. Every
        # title that was met is a token: it learns faster and in a fifth of the tokens (docs/lab.md).
        sft=Sft(
            model=LanguageModel(
                hidden_size=128, layers=4, heads=4, intermediate_size=384, vocabulary=8192, tokens="titles"
            ),
            shuffled=0.6,
            replaced=0.1,
            window_items=40,
            global_batch=8,
            passes=28,
            patience=3,
            validate_every=4,
            validation_rows=1000,
        ),
        negatives=Negatives(num=15),
        align=Align(
            optimiser=Optimiser(learning_rate=2e-4),
            global_batch=32,
            steps=100,
            validate_every=50,
            # All there are: what 256 rows tell apart is more than what alignment changes here (docs/lab.md).
            validation_rows=2000,
        ),
    )
