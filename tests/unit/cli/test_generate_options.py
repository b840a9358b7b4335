"""Options of `nemo-spin generate` that cannot be: each refused in a sentence, before anything is loaded."""

from __future__ import annotations

import pytest

from nemo_spin.cli.main import main


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--top-p", "0"], "--top-p 0.0: use a finite number above 0"),
        (["--top-k", "-1"], "--top-k -1: use a whole number of at least 0"),
        (["--temperature", "nan"], "--temperature nan: use a finite number above 0"),
        (["--repetition-penalty", "0"], "--repetition-penalty 0.0: use"),
        (["--end-string", ""], "--end-string ['']: use"),
        (["--num-samples", "0"], "--num-samples 0: use at least 1"),
        (["--seed", "-1"], "--seed -1: use at least 0"),
        (["--rollout-batch-size", "0"], "--rollout-batch-size 0: use at least 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: use at least 1"),
        (["--max-new-tokens", "4", "--min-new-tokens", "5"], "at least --min-new-tokens 5"),
        (["--greedy", "--temperature", "1"], "--temperature says how to sample"),
        (["--greedy", "--num-samples", "2"], "--num-samples 2: --greedy makes one response"),
        (["--chat-prompt-token", "turn=x"], "--chat-prompt-token 'turn=x': write NAME=TEXT"),
    ],
)
def test_refused(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--checkpoint", "c", "--prompts", "p", "--output", "o", *options]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
