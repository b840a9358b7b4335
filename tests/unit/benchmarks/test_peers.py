"""What is arithmetic in the comparison with the peers, and the talk with its workers."""

import statistics
import subprocess
import sys
from pathlib import Path

import compare
import findings
import pytest
import workloads
from protocol import Worker
from workloads import EOS_ID, MAIN, WORKLOADS

BENCHMARKS = Path(compare.__file__).resolve().parents[1]


@pytest.mark.parametrize("script", ["peers/compare.py", "scaling.py"])
def test_commands_say_how_they_are_used(script):
    done = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--quick" in done.stdout


def test_texts_are_as_skewed_as_is_said():
    texts = workloads.texts(WORKLOADS[MAIN], 1)
    # What was measured with docstrings: 16,966 real tokens of 35,312.
    assert texts.real_tokens == pytest.approx(16_966, rel=0.1)
    assert 0.4 < texts.real_tokens / texts.padded_tokens(8) < 0.52
    lengths = sorted(map(len, texts.rejected))
    batches = [max(lengths[i::8]) for i in range(8)]  # of 32 each
    assert 0.25 < sum(lengths) / (32 * sum(batches)) < 0.4


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=lambda workload: workload.name)
def test_texts_stay_within_their_workload(workload, tmp_path):
    texts = workloads.texts(workload, 3)
    workloads.write(texts, tmp_path)
    assert workloads.read(tmp_path) == texts == workloads.texts(workload, 3)
    assert texts != workloads.texts(workload, 4)
    for prompt, chosen, rejected in zip(texts.prompts, texts.chosen, texts.rejected, strict=True):
        assert workload.prompt_tokens[0] <= len(prompt) <= workload.prompt_tokens[1]
        assert chosen[-1] == EOS_ID and EOS_ID not in [*prompt, *chosen[:-1], *rejected[:-1]]
        assert max(len(chosen), len(rejected)) <= workload.max_new_tokens
        assert len(prompt) + len(rejected) <= workload.context <= workloads.CONTEXT
        assert rejected[-1] == EOS_ID or len(rejected) == workload.max_new_tokens
    if workload.equal:
        assert texts.padded_tokens(8) == texts.real_tokens


def test_ratios_are_medians_of_the_rounds_own():
    # A round on a machine that was busy: both sides three times slower.
    seconds = [(1.0, 2.0), (3.0, 6.3), (1.1, 2.0)]
    line = findings.rate("short", "generated", [(100, 90)] * 3, seconds, 2.0, "peer")
    assert line.ratio == statistics.median([2 / 0.9, 2.1 / 0.9, 2 / 1.1 / 0.9])
    assert line.ours == pytest.approx(100 / 1.1) and line.theirs == 45
    assert line.met is True
    assert findings.duration("short", "iteration", seconds, 2.5, "peer").met is False


def test_memory_is_judged_in_copies_of_the_weights():
    peak, copies = findings.memory_below("short", ours=100, theirs=160, weights=50)
    assert copies.met is True and copies.ours == 1.2
    assert peak.ratio == 1.6
    assert findings.memory_below("short", ours=120, theirs=160, weights=50)[1].met is False


def test_table_shows_which_bars_are_missed():
    lines = [
        findings.duration("short", "iteration", [(1.0, 2.0)], 2.5, "TRL"),
        *findings.memory_below("short", 100, 160, 50),
    ]
    text = findings.table(lines).splitlines()
    assert len({len(line) for line in text}) == 1
    assert ">= 2.5 MISSED" in text[2] and ">= 1 met" in text[4]


def test_a_worker_answers_and_its_end_is_told(tmp_path):
    script = tmp_path / "side.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS / 'peers')!r})\n"
        "from protocol import serve\n"
        "def add(a, b):\n"
        "    print('a library that prints')\n"
        "    return {'sum': a + b}\n"
        "serve({'add': add, 'fail': lambda: {}['nothing']})\n"
    )
    log = tmp_path / "log"
    with Worker("side", [sys.executable, str(script)], {}, log) as worker:
        assert worker.ask("add", a=1, b=2) == {"sum": 3}
        assert worker.ask("add", a=2, b=2) == {"sum": 4}
        with pytest.raises(SystemExit, match=r"side ended at 'fail' with exit code 1(?s:.*)KeyError"):
            worker.ask("fail")
    assert log.read_text().count("a library that prints") == 2


def test_the_sides_have_to_agree(tmp_path):
    class Side:
        def __init__(self, shift):
            self.shift = shift

        def ask(self, do, **told):
            answers = {kind: [-100.0] * 8 for kind in ("chosen", "rejected")}
            answers["rejected"][3] += self.shift
            return answers

    comparison = compare.Comparison(tmp_path, tmp_path, tmp_path, 1)
    comparison.check(Side(0.0), Side(1e-4))
    with pytest.raises(SystemExit, match="The sides differ: a rejected answer"):
        comparison.check(Side(0.0), Side(1.0))
