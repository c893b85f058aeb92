"""What one pass over the prompt is worth: forward and backward of a positive and its negatives, three ways.

    python -m benchmarks.bench_scoring [--quick] [--out benchmarks/results]

Prints a table, and as the last line one JSON object. With a GPU it also measures 0.5B- and 1.5B-parameter shapes in
bf16; without one it says what it would run.
"""

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, Qwen2Config

from benchmarks.align_step import step_overhead
from benchmarks.scoring import (
    Method,
    attend_fast,
    gradient,
    made,
    methods,
    pass_both_ways,
    peak_bytes,
    seconds_each,
    tokens_passed,
    users,
    weights_for,
)

CPU_SHAPE = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
GPU_SHAPES: dict[str, dict[str, Any]] = {
    "0.5B": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "heads": (14, 2)},
    "1.5B": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "heads": (12, 2)},
}
GPU_VOCABULARY = 151_936
GPU_PROMPT = 512  # tokens
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}  # bf16, dense


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="3 repeats and fewer points; to see that it runs")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for the table, the figures as JSON and the plot")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    repeats = 3 if options.quick else options.repeats
    report: dict[str, Any] = {"hardware": hardware(options.threads), "model": CPU_SHAPE, "repeats": repeats}
    report["rows"] = cpu_rows(repeats, quick=options.quick)
    report["vocabulary"] = [vocabulary_memory(size) for size in (8_192, 131_072)]
    print(table(report["vocabulary"]))
    report["align_step"] = step_overhead(CPU_SHAPE, repeats)
    print(table([report["align_step"]]))
    report["gpu"] = gpu_rows(repeats)
    if options.out:
        write(report, options.out)
    print(json.dumps(report))


def cpu_rows(repeats: int, *, quick: bool) -> list[dict[str, Any]]:
    """Return one row a number of negatives and prompt length, in float32 without a GPU."""
    points = [(n, 256) for n in (15, 3, 1, 7, 31, 63)] + [(15, 160), (3, 160)]
    if quick:
        points = [(3, 160), (15, 160)]
    model = made(LlamaConfig(**CPU_SHAPE), dtype=torch.float32, device="cpu")
    attend_fast(model, "cpu")
    rows = []
    for num_negatives, prompt_tokens in points:
        rows.append(compared(model, num_negatives, prompt_tokens, repeats, "cpu"))
        print(table(rows[-1:], header=len(rows) == 1), flush=True)
    return rows


def compared(model: Any, num_negatives: int, prompt_tokens: int, repeats: int, device: str) -> dict[str, Any]:
    """Return times, memory and errors of the three methods, each at its best batch size, per user."""
    vocabulary = model.config.vocab_size
    sizes = [size for size in (1, 2, 4, 8) if size * (1 + num_negatives) <= 64] or [1]

    def batch_of(size: int, method: Method) -> tuple[Any, torch.Tensor]:
        segments = users(size, prompt_tokens=prompt_tokens, num_negatives=num_negatives, vocabulary=vocabulary)
        return method.prepare(segments), weights_for(size * (1 + num_negatives), device)

    each = methods(model, device)
    best: dict[str, int] = {}
    for method in each:
        tried = [(size, *batch_of(size, method)) for size in sizes]
        runs = [partial(pass_both_ways, method, batch, weight) for _, batch, weight in tried]
        times = seconds_each(runs, 2, device)
        best[method.name] = min(zip(times, sizes, strict=True), key=lambda pair: pair[0] / pair[1])[1]
    chosen = [(method, *batch_of(best[method.name], method)) for method in each]
    runs = [partial(pass_both_ways, *each_run) for each_run in chosen]
    times = [t / best[m.name] for t, m in zip(seconds_each(runs, repeats, device), each, strict=True)]
    shared, separate, concatenated = times

    alone = [(method, *batch_of(1, method)) for method in each]
    model.zero_grad(set_to_none=True)
    results = []
    for method, batch, weight in alone:
        results.append((pass_both_ways(method, batch, weight), gradient(model)))
    memory = [peak_bytes(partial(pass_both_ways, *each_run), model, device) for each_run in alone]
    model.zero_grad(set_to_none=True)
    (ours, our_gradient), (theirs, their_gradient), _ = results
    segments = users(1, prompt_tokens=prompt_tokens, num_negatives=num_negatives, vocabulary=vocabulary)
    tokens = tokens_passed(segments)
    ceiling = tokens["separate"] / tokens["shared"]
    return {
        "num_negatives": num_negatives,
        "prompt_tokens": prompt_tokens,
        "shared_ms": round(1000 * shared, 2),
        "separate_ms": round(1000 * separate, 2),
        "concatenated_ms": round(1000 * concatenated, 2),
        "speedup": round(concatenated / shared, 2),
        "speedup_over_separate": round(separate / shared, 2),
        "token_ratio": round(ceiling, 2),
        "share_of_token_ratio": round(separate / shared / ceiling, 3),
        "memory_ratio": round(memory[0] / memory[2], 4),
        "memory_ratio_to_separate": round(memory[0] / memory[1], 4),
        "shared_mib": round(memory[0] / 2**20, 1),
        "score_error": float((ours - theirs).abs().max()),
        "gradient_error": float((our_gradient - their_gradient).norm() / their_gradient.norm()),
        "users_a_batch": [best[method.name] for method in each],
    }


def vocabulary_memory(vocabulary: int) -> dict[str, Any]:
    """Return the peak memory of one shared pass with this vocabulary, weights and their gradients left out."""
    config = LlamaConfig(**(CPU_SHAPE | {"vocab_size": vocabulary, "hidden_size": 64, "intermediate_size": 128}))
    model = made(config, dtype=torch.float32, device="cpu")
    attend_fast(model, "cpu")
    method = methods(model, "cpu")[0]
    segments = users(2, prompt_tokens=256, num_negatives=63, vocabulary=8_192)
    batch, weight = method.prepare(segments), weights_for(128, "cpu")
    pass_both_ways(method, batch, weight)
    scored = int(segments.candidate_lengths.sum())
    return {
        "vocabulary": vocabulary,
        "scored_tokens": scored,
        "peak_mib": round(peak_bytes(partial(pass_both_ways, method, batch, weight), model, "cpu") / 2**20, 1),
        "head_gradient_mib": round(vocabulary * 64 * 4 / 2**20, 1),
        "logits_mib": round(scored * vocabulary * 4 / 2**20, 1),
    }


def gpu_rows(repeats: int) -> list[dict[str, Any]]:
    """Return tokens/s, share of the peak and memory for larger shapes in bf16, or say what would be run."""
    points = [(name, n, saving) for name in GPU_SHAPES for n in (3, 15) for saving in (False, True)]
    if not torch.cuda.is_available():
        for name, num_negatives, saving in points:
            print(
                f"no GPU here; on one: Qwen-shaped {name}, bf16, prompt 512, N = {num_negatives}, "
                f"{'with' if saving else 'without'} gradient checkpointing, shared against both baselines"
            )
        return []
    rows = []
    for name, num_negatives, saving in points:
        rows.append(gpu_row(name, num_negatives, repeats, saving=saving))
        print(table(rows[-1:], header=len(rows) == 1), flush=True)
    return rows


def gpu_row(name: str, num_negatives: int, repeats: int, *, saving: bool, device: str = "cuda") -> dict[str, Any]:
    """Measure one shape in bf16."""
    shape = {key: value for key, value in GPU_SHAPES[name].items() if key != "heads"}
    heads, groups = GPU_SHAPES[name]["heads"]
    config = Qwen2Config(
        **({"vocab_size": GPU_VOCABULARY, "max_position_embeddings": 4096} | shape),
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
    )
    model: Any = made(config, dtype=torch.bfloat16, device=device)
    attention = attend_fast(model, device)
    if saving:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    row = compared(model, num_negatives, GPU_PROMPT, repeats, device)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = tokens_passed(
        users(1, prompt_tokens=GPU_PROMPT, num_negatives=num_negatives, vocabulary=config.vocab_size)
    )
    per_second = tokens["shared"] / (row["shared_ms"] / 1000)
    kind = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in kind), None)
    return {
        "shape": name,
        "attention": attention,
        "gradient_checkpointing": saving,
        **row,
        "tokens_per_s": round(per_second),
        "mfu": round(6 * parameters * per_second / peak, 3) if peak else None,
    }


def hardware(threads: int) -> str:
    """Return what this ran on, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {threads} threads, torch {torch.__version__}"


def table(rows: list[dict[str, Any]], *, header: bool = True) -> str:
    """Return rows as text, aligned."""
    names = list(rows[0])
    cells = [[_cell(row[name]) for name in names] for row in rows]
    widths = [max(len(name), 8) for name in names]
    lines = [cells] if not header else [[names], cells]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for part in lines
        for line in part
    )


def _cell(value: Any) -> str:
    return f"{value:.1e}" if isinstance(value, float) and 0 < value < 1e-3 else str(value)


def write(report: dict[str, Any], folder: Path) -> None:
    """Write the figures, a table in Markdown and the curve over N."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    kind = "gpu" if torch.cuda.is_available() else f"cpu{os.cpu_count()}"
    stem = folder / f"scoring_{kind}_{datetime.now(UTC):%Y%m}"
    stem.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    rows = report["rows"]
    names = [name for name in rows[0] if name != "users_a_batch"]
    lines = [f"# Scoring, {report['hardware']}", "", "Forward and backward a user, median of interleaved repeats.", ""]
    lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n")
    curve = sorted((row for row in rows if row["prompt_tokens"] == 256), key=lambda row: row["num_negatives"])
    if not curve:
        return
    figure, axes = plt.subplots(figsize=(6, 4))
    count = [row["num_negatives"] for row in curve]
    for name, label in (
        ("speedup", "over the concatenated batch"),
        ("speedup_over_separate", "over separate rows"),
        ("token_ratio", "what counting tokens allows, over separate rows"),
    ):
        axes.plot(count, [row[name] for row in curve], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="negatives", ylabel="times faster, forward and backward")
    axes.set_xticks(count, [str(n) for n in count])
    axes.legend()
    figure.tight_layout()
    figure.savefig(stem.with_suffix(".png"), dpi=120)


if __name__ == "__main__":
    main()
