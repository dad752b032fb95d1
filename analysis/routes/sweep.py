"""Runs many fits side by side and keeps one row for each.

`python -m analysis.routes.sweep PLAN.json RESULTS.csv --jobs 8`.

A plan is a list of {"name", "contender": {...}, "common": {...}}: `contender` holds the fields of
`analysis.routes.contenders.Contender`, `common` settings by section. Rows that RESULTS.csv already
has are not run again, unless
their settings have changed; jobs are spread over all GPUs.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import shutil
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.routes.contenders import Contender
from bayes_router.benchmark.rows import Rows
from bayes_router.config import Config, config_from_dict, with_changes
from bayes_router.presets import preset
from bayes_router.training.evaluate import evaluate
from bayes_router.training.fit import Trainer, count_parameters, load_data, pick_device

ROOT = Path(__file__).parents[2]


WORDS = ("settings", "commit")  # columns of hashes


def run_one(job: dict[str, Any]) -> dict[str, Any]:
    """Train and evaluate one contender; a flat row."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    contender = Contender(**job["contender"])
    base = preset(job.get("preset", "tiny"))
    config, data = load_data(contender.config(config_from_dict(job["common"], base)))
    device = pick_device(config.train.device)
    if device.type == "cuda":  # `auto` cannot know that a graph holds this study's own experts
        config = with_changes(config, {"train.graph": "on"})
    started = time.perf_counter()
    trainer = Trainer(config, data, device, contender.build_model(), contender.build_objective())
    for step in range(config.train.steps):
        trainer.step(step)
    seconds = time.perf_counter() - started
    limit, batch = max(config.data.eval_tokens, config.data.context), config.train.batch_size
    result = evaluate(
        trainer.model,
        data.valid,
        trainer.prior.concentration,
        prior_tilt=trainer.prior.tilt,
        context=config.data.context,
        batch_size=batch,
        limit=limit,
    )
    row = {
        "contender": job["name"],
        "corpus": config.data.corpus,
        "context": config.data.context,
        "tokens": config.train.steps * batch * config.data.context,
        "seed": config.train.seed,
        "lr": config.train.lr,
        "settings": settings(job),
        "nll_mean": result.nll["mean"],
        "nll_sample": result.nll["sample"],
        "nll_hard": result.nll["hard"],
        "cost_paper": result.executed_cost["paper"],
        "cost_flops": result.executed_cost["flops"],
        "flops_counted": result.executed["attention_prefill"]["flops"],
        "route_information": float(torch.tensor(result.route_information_per_layer).mean()),
        "context_information": float(torch.tensor(result.context_information_per_layer).mean()),
        "least_kl": min(result.kl_per_layer)
        if contender.kind == "svi"
        else math.nan,  # others have no posterior
        "kl": sum(result.kl_per_layer) if contender.kind == "svi" else math.nan,
        "routing_entropy": float(torch.tensor(result.entropy_of_mean_per_layer).mean()),
        "load": json.dumps([[round(x, 3) for x in layer] for layer in result.load_per_layer]),
        "information": json.dumps([round(x, 3) for x in result.route_information_per_layer]),
        "parameters": count_parameters(trainer.model),
        "seconds": round(seconds, 1),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "commit": commit(),
    }
    if device.type == "cuda":
        del trainer  # a captured step and it hold one another, and device memory with them
        gc.collect()
        torch.cuda.empty_cache()
    return row


def commit() -> str:
    """Of the code, marked where something other than results was changed since.

    Nothing where there is no repository.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], capture_output=True, text=True, check=False, cwd=ROOT
        ).stdout.strip()

    if shutil.which("git") is None:
        return ""
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!analysis/results")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a row the same run."""
    return row["contender"], row["corpus"], row["context"], row["seed"], row.get("settings")


def planned(job: dict[str, Any]) -> tuple[Any, ...]:
    """The identity that a job's row will have."""
    config: Config = config_from_dict(job["common"], preset(job.get("preset", "tiny")))
    return job["name"], config.data.corpus, config.data.context, config.train.seed, settings(job)


def settings(job: dict[str, Any]) -> str:
    """A fingerprint of all that a job sets but its seed and device."""
    common = {section: dict(table) for section, table in job["common"].items()}
    common["train"] = {
        key: value
        for key, value in common.get("train", {}).items()
        if key not in ("seed", "device")
    }
    told = json.dumps([job["contender"], common, job.get("preset", "tiny")], sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:10]


def _take_device(counter: Any, devices: int) -> None:
    """Give a worker one of the GPUs, in turn."""
    if devices > 1:
        with counter.get_lock():
            os.environ["CUDA_VISIBLE_DEVICES"] = str(counter.value % devices)
            counter.value += 1


def sweep(plan: list[dict[str, Any]], results: Path, jobs: int) -> pd.DataFrame:
    """Run what is missing, `jobs` at a time; results are written after every run."""
    rows = Rows(results, digits=None, resume=True, words=WORDS)
    done = {identity(row) for row in rows.rows}
    missing = [job for job in plan if planned(job) not in done]
    context = get_context("spawn")
    share = (context.Value("i", 0), torch.cuda.device_count())
    with ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_take_device, initargs=share
    ) as pool:
        futures = {pool.submit(run_one, job): job["name"] for job in missing}
        for future in as_completed(futures):
            try:
                row = future.result()
            except Exception as error:  # one failed run must not lose the others
                print(f"{futures[future]}: {type(error).__name__}: {error}", flush=True)
                continue
            print(
                f"{row['contender']}, seed {row['seed']}: {row['nll_hard']:.4f} at "
                f"{row['cost_paper']:.3f}",
                flush=True,
            )
            rows.add(row)
    return rows.frame()


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plan", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--jobs", type=int, default=2)
    args = parser.parse_args()
    frame = sweep(json.loads(args.plan.read_text()), args.results, args.jobs)
    columns = [
        "contender",
        "seed",
        "nll_mean",
        "nll_hard",
        "cost_paper",
        "route_information",
        "context_information",
        "kl",
        "load",
        "seconds",
    ]
    with pd.option_context(
        "display.width", 220, "display.max_colwidth", 130, "display.max_rows", 500
    ):
        print(
            frame[columns]
            .sort_values("nll_hard")
            .to_string(index=False, float_format=lambda x: f"{x:.3f}")
        )


if __name__ == "__main__":
    main()
