"""The whole flow on synthetic logs with known truth, in minutes on two cores without a GPU."""

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
    Synthetic,
    Tune,
    Users,
)
from recray.space import Range


def demo() -> Pipeline:
    """Synthetic logs and a small Llama from scratch: minutes on two cores."""
    return Pipeline(
        name="demo",
        ingest=Ingest(synthetic=Synthetic(interactions=30_000, users=1_000, items=500)),
        sequences=Sequences(
            split="time_cut",
            targets_per_user=3,
            examples_per_user=5,
            num_candidates=50,
            max_validation_rows=600,
            max_test_rows=1_500,
        ),
        users=Users(dim=48, passes=15),
        sft=Sft(
            model=LanguageModel(
                hidden_size=96, layers=2, heads=4, intermediate_size=256, max_positions=512, vocabulary=768
            ),
            prompt=Prompt(template="titles", max_tokens=256),
            optimiser=Optimiser(learning_rate=3e-3),
            passes=5,
            validation_rows=256,
        ),
        negatives=Negatives(num=7),
        align=Align(
            optimiser=Optimiser(learning_rate=2e-4),
            global_batch=16,
            steps=100,
            validate_every=50,
            validation_rows=256,
        ),
        tune=Tune(
            space={"margin_base": Range(uniform=(0.0, 2.0)), "num_negatives": Range(choice=(3, 7))}, trials=2, steps=20
        ),
    )
