"""Amazon Video Games with its published leave-one-out split and candidates."""

from recray.config import (
    Align,
    Ingest,
    LanguageModel,
    Negatives,
    Optimiser,
    Pipeline,
    Prompt,
    Sequences,
    Sft,
    Users,
)


def amazon() -> Pipeline:
    """Amazon reviews with the published split, on a seeded sample of users: a run of two cores."""
    return Pipeline(
        name="amazon",
        # The published candidates exist for 6,000 of the 50,546 test users; the sample is drawn over all users.
        ingest=Ingest(max_users=4_000),
        sequences=Sequences(
            split="published",
            num_candidates=100,
            examples_per_user=2,  # histories are short: 8.7 interactions a user
            max_history=10,
            max_validation_rows=500,
            max_test_rows=1_000,
        ),
        users=Users(dim=64, max_history=20, passes=40),
        sft=Sft(
            model=LanguageModel(hidden_size=128, layers=4, heads=4, intermediate_size=384, vocabulary=4096),
            # Titles run to 113 words: the oldest items go when a prompt is longer than this.
            prompt=Prompt(max_tokens=384),
            passes=6,
            validation_rows=256,
        ),
        negatives=Negatives(num=15),
        align=Align(
            optimiser=Optimiser(learning_rate=2e-4), global_batch=32, steps=100, validate_every=25, validation_rows=256
        ),
    )
