"""The quick start: a small model learns to write numbers in words from careless people, then SPIN makes it careful.

    make quickstart                                       or, in an environment with the package:
    python examples/quickstart/run.py --devices 2 --tp 2 --pp 1

1. data and tokenizer         numbers_in_words.py
2. SFT on careless answers    sft.py
3. SPIN on careful answers    nemo-spin train, as with any other model and data
4. the comparison             compare.py: held-out figures, beside the same number of further SFT steps

Everything happens on the CPU, without a network, in some minutes, and lies in quickstart_run/ afterwards.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numbers_in_words
import report
import sft

from nemo_spin.cli.launch import guarded
from nemo_spin.errors import UserError

HERE = Path(__file__).resolve().parent
MARK = "# made by nemo_spin's quick start, which removes this directory when it runs again\n*\n"
BATCH_SIZE, LR = 64, 1e-4


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="SPIN on a small model of its own, on the CPU.")
    add = parser.add_argument
    add("--devices", type=int, default=int(os.environ.get("DEVICES", "2")), help="processes for SPIN (default 2)")
    add("--tp", type=int, default=int(os.environ.get("TP", "2")), help="tensor-parallel size (default 2)")
    add("--pp", type=int, default=int(os.environ.get("PP", "1")), help="pipeline-parallel size (default 1)")
    add("--seed", type=int, default=1, help="of weights, data order and samples (default 1)")
    add("--output", type=Path, default=Path("quickstart_run"), help="directory to write (default quickstart_run)")
    return parser.parse_args()


def check_layout(devices: int, tp: int, pp: int) -> None:
    """Refuse what cannot work before minutes have gone into the SFT model."""
    if tp < 1 or sft.HEADS % tp:
        raise UserError(f"TP={tp} does not divide the model's {sft.HEADS} attention heads: use 1, 2 or 4.")
    if pp < 1 or sft.LAYERS % pp:
        raise UserError(f"PP={pp} does not divide the model's {sft.LAYERS} layers: use 1 or 2.")
    if devices < 1 or devices % (tp * pp) or BATCH_SIZE % (devices // (tp * pp)):
        raise UserError(f"DEVICES={devices} is no multiple of TP x PP = {tp * pp} that fits: try DEVICES={tp * pp}.")


def make_directory(directory: Path) -> None:
    """An empty directory; an old one is removed only if the quick start made it."""
    if directory.exists():
        mark = directory / ".gitignore"
        if not mark.is_file() or mark.read_text(encoding="utf-8") != MARK:
            raise UserError(f"{directory} exists and was not made by the quick start: move it, or give --output.")
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    (directory / ".gitignore").write_text(MARK, encoding="utf-8")


def spin_overrides(args: argparse.Namespace) -> list[str]:
    """What a training run needs to be told, over conf/gpt_spin_tiny.yaml."""
    data_parallel_size = args.devices // (args.tp * args.pp)
    return [
        f"trainer.devices={args.devices}",
        f"model.tensor_model_parallel_size={args.tp}",
        f"model.pipeline_model_parallel_size={args.pp}",
        f"pretrained_checkpoint.restore_from_path={args.output}/sft.nemo",
        f"model.data.train_ds.file_path={args.output}/careful.jsonl",
        f"model.data.validation_ds.file_path={args.output}/held_out.jsonl",
        f"model.data.train_ds.prompt_template='{numbers_in_words.PROMPT_TEMPLATE}'",
        f"exp_manager.explicit_log_dir={args.output}/spin",
        "trainer.spin.max_iterations=3",
        "trainer.spin.max_epochs=3",
        "model.spin.ref_policy_kl_penalty=5",
        f"model.optim.lr={LR}",
        "model.optim.sched.min_lr=0",
        "model.optim.weight_decay=0.01",
        f"model.global_batch_size={BATCH_SIZE}",
        f"model.micro_batch_size={BATCH_SIZE // data_parallel_size}",
        "model.spin.rollout_batch_size=256",
        "model.spin.log_prob_forward_micro_batch_size=128",
        "model.spin.length_params.max_length=16",
        f"model.seed={args.seed}",
    ]


def run(*command: str) -> None:
    """Run a step of the quick start in a process of its own. However this one is ended, nothing of it stays behind."""
    # On a model of this size more threads do no good, and harm where the cores have other work.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    # In a session of its own it does not get the terminal's Ctrl-C; it is told once, here, and then cleans up.
    with subprocess.Popen([sys.executable, *command], env=environment, start_new_session=True) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        raise UserError(f"This step of the quick start ended with exit code {code}: {shlex.join(command)}")


def heading(text: str, started: float) -> None:
    print(f"\n[{time.monotonic() - started:3.0f} s] {text}", flush=True)


def main() -> None:
    args = parse()
    check_layout(args.devices, args.tp, args.pp)
    for received in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(received, signal.default_int_handler)
    started = time.monotonic()
    make_directory(args.output)

    heading("1/4  Data: numbers in words, by careless and by careful people", started)
    numbers_in_words.write_data(args.output)
    numbers_in_words.write_tokenizer(args.output / "tokenizer")

    heading(f"2/4  SFT: a model learns from careless people ({args.output}/sft.nemo)", started)
    run(str(HERE / "sft.py"), str(args.output), str(args.seed))

    overrides = spin_overrides(args)
    heading("3/4  SPIN: it plays against itself over careful people's answers\n", started)
    shown = [f'"{override}"' if " " in override else override for override in overrides]
    print(" \\\n    ".join(["nemo-spin train --config-name gpt_spin_tiny", *shown]), end="\n\n", flush=True)
    run("-m", "nemo_spin", "train", "--config-name", "gpt_spin_tiny", *overrides)

    heading("4/4  Comparison on held-out numbers, with further SFT beside SPIN\n", started)
    run(str(HERE / "compare.py"), str(args.output), str(args.seed), str(LR))
    report.show(args.output)
    heading("Done", started)


if __name__ == "__main__":
    sys.exit(guarded(main))
