"""The commands as a person types them: train on two processes, go on, score, generate; what a mistake looks like."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml

from nemo_spin.model_io.open import open_checkpoint

FAMILIES = {"nemo2": "nemo2", "megatron": "bridge", "hf": "huggingface"}
REPO = Path(__file__).resolve().parents[2]

MAKE_INPUTS = """
import sys
from nemo_spin.megatron import setup
from runs import make_checkpoint, make_data
setup.initialize(1, 1, seed=1)
print(make_checkpoint(sys.argv[1]))
make_data(sys.argv[1])
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(REPO), str(REPO / "tests" / "distributed")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    made = run("-c", MAKE_INPUTS, str(directory), cwd=directory)
    assert made.returncode == 0, made.stderr
    return directory


def train(inputs: Path, run_dir: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return run(
        str(REPO / "examples" / "train_gpt_spin.py"),
        "--config-name=gpt_spin_tiny",
        f"pretrained_checkpoint.restore_from_path={inputs}/sft.nemo",
        f"model.data.train_ds.file_path={inputs}/train.jsonl",
        f"model.data.validation_ds.file_path={inputs}/train.jsonl",
        f"exp_manager.explicit_log_dir={run_dir}",
        "model.spin.length_params.max_length=8",
        "model.global_batch_size=8",
        "model.micro_batch_size=4",
        *overrides,
        cwd=run_dir.parent,
    )


def what_is_written_at_the_end_is_the_same_in_every_format(nemo: Path) -> None:
    with open_checkpoint(nemo) as source:
        store = source.weights()
        expected = {name: store.read(name) for name in store.tensors}
    for name, family in FAMILIES.items():
        with open_checkpoint(nemo.with_name(f"{nemo.stem}-{name}")) as source:
            assert source.family == family
            store = source.weights()
            assert set(store.tensors) == set(expected)
            for key, tensor in expected.items():
                found = store.read(key)
                assert torch.equal(found, tensor[: len(found)]), (name, key)


def test_train_go_on_and_score(inputs: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    layout = ("trainer.devices=2", "model.tensor_model_parallel_size=2")
    on_end = [f"exp_manager.checkpoint_callback_params.save_{name}_on_train_end=true" for name in FAMILIES]
    first = train(inputs, run_dir, *layout, "trainer.spin.max_iterations=1", *on_end)
    assert first.returncode == 0, first.stderr
    nemo = run_dir / "checkpoints" / "megatron_gpt_spin_tiny.nemo"
    what_is_written_at_the_end_is_the_same_in_every_format(nemo)
    assert "iteration 0" in first.stderr
    assert f"Saved {nemo}" in first.stderr
    assert list(run_dir.glob("events.out.tfevents.*"))
    assert not list(run_dir.rglob("*unfinished*"))
    the_loggers_have_what_the_file_has(run_dir)

    second = train(inputs, run_dir, "trainer.devices=2", "model.pipeline_model_parallel_size=2")
    assert second.returncode == 0, second.stderr
    assert "Resumed from" in second.stderr
    assert "rewards/margins" in (run_dir / "report.html").read_text(encoding="utf-8")
    # The second iteration, which the first run did not know of, trains on the pairs of the first one as well.
    assert json.loads((run_dir / "checkpoints" / "iteration-002-step-0000009" / "state.json").read_text())

    data, output = tmp_path / "data.jsonl", tmp_path / "scores.jsonl"
    rows = [{"input": "4 plus 5", "output": "makes 9"}, {"prompt_ids": [5, 6], "response_ids": [7, 8, 2]}] * 2
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    scored = {}
    for layout_options in (("--tp", "1"), ("--tp", "2", "--tokenizer", str(inputs / "tokenizer.model"))):
        done = run(
            "-m", "nemo_spin", "score", "--checkpoint", str(nemo), "--data", str(data), "--output", str(output),
            "--micro-batch-size", "2", *layout_options, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        scored[layout_options] = [json.loads(line) for line in output.read_text().splitlines()]
    one, two = scored.values()
    assert [row["num_tokens"] for row in one] == [one[0]["num_tokens"], 3] * 2
    assert one[0]["token_logps"] == pytest.approx(one[2]["token_logps"], rel=1e-5)
    for a, b in zip(one, two, strict=True):
        assert sum(a["token_logps"]) == pytest.approx(a["logp"])
        torch.testing.assert_close(torch.tensor(a["token_logps"]), torch.tensor(b["token_logps"]), rtol=1e-4, atol=1e-5)


def test_nemo_aligners_configuration_trains_unchanged(inputs: Path, tmp_path: Path) -> None:
    """Its file as it is; overrides of its own keys, written as its users write them, for a small model on a CPU."""
    run_dir = tmp_path / "run"
    done = run(
        str(REPO / "examples" / "train_gpt_spin.py"),
        f"--config-path={REPO / 'tests' / 'nemo_aligner'}",
        "--config-name=gpt_spin",
        f"pretrained_checkpoint.restore_from_path={inputs}/sft.nemo",
        f"model.data.train_ds.file_path={inputs}/train.jsonl",
        f"model.data.validation_ds.file_path={inputs}/train.jsonl",
        f"exp_manager.explicit_log_dir={run_dir}",
        "trainer.num_nodes=1",
        "trainer.devices=2",
        "++trainer.accelerator=cpu",
        "trainer.precision=32",
        "trainer.spin.max_iterations=2",
        "+trainer.spin.max_steps=3",
        "model.global_batch_size=8",
        "model.data.train_ds.max_seq_length=64",
        "++model.tensor_model_parallel_size=2",
        "model.spin.rollout_micro_batch_size=4",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (run_dir / "checkpoints" / "megatron_gpt.nemo").is_file()
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == len(set(notes)) == 8
    assert any("model.spin.rollout_micro_batch_size = 4 is taken as" in note for note in notes)
    assert any("model.pipeline_model_parallel_size is not given" in note for note in notes)
    ran = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))["model"]
    with tarfile.open(inputs / "sft.nemo") as archive:
        (name,) = [name for name in archive.getnames() if name.endswith("model_config.yaml")]
        length = yaml.safe_load(archive.extractfile(name))["encoder_seq_length"]
    assert (ran["encoder_seq_length"], ran["spin"]["length_params"]["max_length"]) == (length, length // 2)


def the_loggers_have_what_the_file_has(run_dir: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir))
    events.Reload()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    for name in ("rewards/margins", "logps/chosen", "kl", "grad_norm", "lr", "throughput/train_tokens_per_second"):
        points = {point.step: point.value for point in events.Scalars(name)}
        assert points == pytest.approx({line["step"]: line[name] for line in trained}, rel=1e-6)
    assert [line["kind"] for line in lines][-2:] == ["checkpoint", "end"]
    assert "samples/0/text_summary" in events.Tags()["tensors"]


def generate(inputs: Path, prompts: Path, output: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run(
        "-m", "nemo_spin", "generate", "--checkpoint", str(inputs / "sft.nemo"), "--prompts", str(prompts),
        "--output", str(output), "--num-samples", "2", "--max-new-tokens", "6", *options, cwd=output.parent,
    )  # fmt: skip


def test_generate_go_on_and_score(inputs: Path, tmp_path: Path) -> None:
    prompts, output, scores = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl", tmp_path / "scores.jsonl"
    rows = [{"prompt": "4 plus 5"}, {"prompt_ids": [5, 6], "id": "ids"}, {"input": "4 plus 5", "output": "unused"}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = generate(inputs, prompts, output)
    assert done.returncode == 0, done.stderr
    assert "read 3 examples" in done.stderr
    whole = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert [(line["id"], line["sample"]) for line in whole] == [(i, j) for i in (0, "ids", 2) for j in (0, 1)]
    assert whole[0]["prompt_ids"] == whole[5]["prompt_ids"]
    assert whole[2]["prompt_ids"] == [5, 6]

    scored = run(
        "-m", "nemo_spin", "score", "--checkpoint", str(inputs / "sft.nemo"), "--data", str(output),
        "--output", str(scores), cwd=tmp_path,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    logps = [json.loads(line)["logp"] for line in scores.read_text().splitlines()]
    assert logps == pytest.approx([line["logp"] for line in whole], rel=1e-5)

    output.write_bytes(output.read_bytes()[:-20])
    done = generate(inputs, prompts, output, "--tp", "2")
    assert done.returncode == 0, done.stderr
    assert "5 of 6 responses are there already" in done.stderr
    again = [json.loads(line) for line in output.read_bytes().splitlines()]
    assert again[-1]["logp"] == pytest.approx(whole[-1]["logp"], rel=1e-4)
    assert again == [*whole[:-1], whole[-1] | {"logp": again[-1]["logp"]}]

    before = output.read_bytes()
    refused = generate(inputs, prompts, output, "--temperature", "0.7")
    assert refused.returncode == 2
    assert "was begun with temperature 1.0, and not 0.7" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.spin.max_iteration=1"], "trainer.spin.max_iterations"),
        (["trainer.devices=2", "model.data.train_ds.file_path=none.jsonl"], "none.jsonl"),
    ],
    ids=["mistyped key", "missing file"],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(
    inputs: Path, tmp_path: Path, overrides: list[str], words: str
) -> None:
    failed = train(inputs, tmp_path / "run", *overrides)
    assert failed.returncode == 2, failed.stderr
    sentences = [line for line in failed.stderr.splitlines() if line.startswith("error:")]
    assert len(sentences) == 1
    assert words in sentences[0]
    assert "Traceback" not in failed.stderr
    assert not list(tmp_path.iterdir())
