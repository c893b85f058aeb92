"""Preference optimisation from the SFT model: NAPO and its family. Ray Train and DeepSpeed ZeRO."""

from recray.config import Align
from recray.stages.alignment import alignment, meet_the_truth, remove_parts, run_alignment, write_examples
from recray.stages.flow import Job
from recray.stages.recommender import refuse_other_reference, warn_of_dropout, write_fitted


def run(job: Job) -> None:
    """Join the examples, fit the model, write the best weights."""
    part: Align = job.part
    refuse_other_reference(job.workspace)
    warn_of_dropout("align", part.lora)
    name = f"align-{job.fingerprint}"
    examples = f"{name}-examples"
    setting = alignment(job.workspace, part, job.seed, examples)
    job.out.counts["examples"] = write_examples(job.workspace, examples)
    facts, guarded = meet_the_truth(setting)
    job.out.facts |= facts
    if guarded:
        job.out.write_json("guard.json", guarded)
    fitted = run_alignment(setting, job.resources, run=name, name="align")
    write_fitted(job.out, fitted, job.workspace.folder("sft", "model"), name, lora=part.lora, base="sft/model")
    job.out.facts["objective"] = part.objective.model_dump(mode="json")
    job.workspace.remove(".training", name)
    remove_parts(job.workspace, name)
    job.workspace.remove(".training", examples)
