"""What is written in the HTML report and in docs/study.md alike: the introduction, and figures in rows and cells."""

from __future__ import annotations

import math

from claims import Claim, Comparison
from evidence import SFT_MODEL, Estimate, Study
from tasks import Figure

_LANGUAGE = (
    Figure("kl", "KL(data, policy)", "lower", "{:.4f}"),
    Figure("kl_within", "among responses of the language", "lower", "{:.4f}"),
    Figure("aim", "Theorem 5.4 from the opponent there was", "none", "{:.4f}"),
    Figure("way", "Theorem 5.4 from the start", "none", "{:.4f}"),
    Figure("floor", "by counting", "none", "{:.4f}"),
    Figure("mass", "probability of the language's responses", "none"),
    Figure("train/val/rewards/accuracies", "SPIN's accuracy on held-out pairs", "none"),
)


def introduction(study: Study) -> list[str]:
    """Paragraphs: what was done, at what scale, and how long it took."""
    scale, numbers = study.scale, study.known["numbers"]
    paragraphs = [
        "Chen et al. 2024 (arXiv 2401.01335) tried SPIN with one model of 7 billion parameters. Here every claim "
        "of theirs is looked up with models of some hundred thousand parameters that are made on the spot, with "
        "several seeds, on tasks where the answer can be computed. All numbers come from runs of this package: "
        f"scale {scale.name!r}, {scale.seeds} seeds{f', {scale.gsm8k_seeds} on GSM8K' if study.has_gsm8k else ''}. "
        "Learning rates, betas and sizes were chosen on seed 0 (of the language on 0 and 1), which the study does "
        "not have.",
        f"Numbers in words: a model learns ({numbers.sft.steps} steps) to write numbers in words from "
        f"{numbers.train:,} answers of careless people, 45% of which have a mistake; SPIN and its controls then "
        f"train on up to {max(*scale.sizes, scale.examples):,} right answers, {scale.examples:,} unless said "
        f"otherwise, {numbers.epochs} epochs an iteration, batches of {numbers.batch_size}, learning rate "
        f"{numbers.lr:g}, beta 5. Figures are of {scale.held_out:,} held-out numbers.",
        "Tuning: of SPIN, 8 pairs of learning rate and beta were tried on numbers in words and 9 settings "
        "(learning rate, beta, epochs, an SFT term, two lengths of SFT before it) on GSM8K, and the one that "
        "looked best was taken; further SFT has SPIN's learning rate and 0.3 of it, without a search of its own. "
        "That favours SPIN. On GSM8K the held-out problems of the tuning are those of the study.",
        "A claim holds where the 95% confidence interval of the mean paired difference (Student's t over seeds) "
        "lies on the claimed side of zero, fails where it lies on the other, and is undecided where zero is "
        "inside; of several comparisons all have to hold. The rules were fixed before the first run at this scale "
        "on the study's seeds, but after the runs for tuning; in the language the margin around Theorem 5.4 was "
        "widened from 1.5 to 2 after these. With some dozens of comparisons one or two come out wrongly by chance.",
    ]
    if study.has_gsm8k:
        text = study.known["gsm8k"]
        paragraphs.append(
            f"Real text: GSM8K's {text.train:,} problems that fit into {text.context} tokens with their answers; a "
            f"model from scratch ({scale.gsm8k_shape.label}) learns them ({text.sft.steps} steps of "
            f"{text.sft.batch_size}) and then plays on the same ones, {text.epochs} epoch an iteration, batches of "
            f"{text.batch_size}, learning rate {text.lr:g}, beta {text.beta:g}. Figures are of {text.held_out} "
            "held-out problems."
        )
    else:
        paragraphs.append(
            "Real text was left out: GSM8K was not there. Give its directory with --gsm8k, with train.jsonl and "
            'validation.jsonl, one {"input", "output"} a line.'
        )
    paragraphs.append(
        "Not looked at: the Open LLM Leaderboard and MT-Bench, which small models cannot answer, and the "
        "comparison with DPO on preferences of GPT-4, for which there are none."
    )
    spent = study.spent()
    parts = ", ".join(
        f"{name} {spent[name] / 60:.1f}"
        for name in ("SFT", "rollouts", "training steps", "measuring", "others")
        if name in spent
    )
    number = sum(len(results) for results in study.results.values())
    paragraphs.append(
        f"Time: {study.wall / 60:.1f} minutes. All {number} runs together took {spent.get('all', 0.0) / 60:.1f} "
        f"minutes of one process: {parts}. "
        f"Runs that failed: {len(study.failures)}."
    )
    return paragraphs


def comparisons(claim: Claim) -> list[list[str]]:
    """Rows: words, this, other, difference, seeds, verdict."""
    return [
        [
            comparison.words,
            _with_error(comparison.this, comparison.form),
            "-" if comparison.other is None else _with_error(comparison.other, comparison.form),
            _difference(comparison),
            str(comparison.difference.number),
            comparison.verdict,
        ]
        for comparison in claim.comparisons
    ]


def all_figures(study: Study) -> list[tuple[str, list[str], list[list[str]]]]:
    """Tables of every variant after every iteration: title, columns, rows; means and standard errors."""
    found = []
    for task, title, figures in (
        ("language", "The language", _LANGUAGE),
        *((name, known.label, known.figures) for name, known in study.known.items()),
    ):
        rows = []
        for name, variant in study.variants.items():
            if variant.job.task != task:
                continue
            if variant.job.kind in ("start", "language"):
                iterations = study.iterations(name)
            else:
                iterations = [i for i in study.iterations(name) if i != SFT_MODEL]
            for iteration in iterations:
                after = (
                    ""
                    if iteration == SFT_MODEL
                    else f", after {'round' if variant.job.kind == 'sft' else 'iteration'} {iteration}"
                )
                cells = [_with_error(study.estimate(name, iteration, f.key), f.form) for f in figures]
                rows.append([f"{variant.label}{after}", *cells])
        found.append(
            (f"{title}: means over seeds and their standard errors", ["policy", *(f.label for f in figures)], rows)
        )
    return found


def _with_error(estimate: Estimate, form: str) -> str:
    if estimate.number == 0:
        return "-"
    return form.format(estimate.mean) + ("" if math.isnan(estimate.error) else f" ± {form.format(estimate.error)}")


def _difference(comparison: Comparison) -> str:
    d = comparison.difference
    if d.number == 0:
        return "-"
    sign = f"{d.mean:+.3f}"
    return sign if math.isnan(d.interval) else f"{sign} ({d.mean - d.interval:+.3f} to {d.mean + d.interval:+.3f})"
