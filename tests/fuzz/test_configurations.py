"""Whatever a configuration or an override says: a `SpinConfig` as documented, or one sentence that names the key."""

from __future__ import annotations

import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from config_inputs import EDGES, FILES, GIVEN, OVERRIDES, READ_KEYS, SETTINGS, SHIPPED, configurations, put
from config_oracle import broken_promises
from fuzzing import Fuzz, check_sentence
from hydra import compose, initialize_config_dir

from nemo_spin.config import (
    addable_overrides,
    check_overrides,
    config_dir,
    notices,
    parse_config,
    register_resolvers,
    resolved,
    with_shipped_configurations,
)
from nemo_spin.config.composing import composing
from nemo_spin.config.parse import judged
from nemo_spin.config.plain import check_plain
from nemo_spin.config.review import VERDICTS, verdicts
from nemo_spin.errors import ConfigError


@pytest.fixture(scope="module")
def base() -> dict[str, Any]:
    """The shipped configuration, resolved, with what has to be given."""
    base = resolved({**SHIPPED, "pretrained_checkpoint": {"restore_from_path": "sft.nemo"}})
    base["model"]["data"]["train_ds"]["file_path"] = "train.jsonl"
    return base


@pytest.mark.parametrize("key", READ_KEYS)
def test_every_edge_of_a_key(base: dict[str, Any], key: str) -> None:
    outcomes = {check_value(base, key, value) for value in EDGES}
    assert "refused" in outcomes


def test_values(fuzz: Fuzz, base: dict[str, Any]) -> None:
    """One key at a time, without OmegaConf, which would take nine tenths of the time."""
    tally = fuzz(SETTINGS, lambda setting: check_value(base, *setting), number=300)
    assert tally.outcomes["taken"] > 0.03 * tally.tried and tally.outcomes["refused"] > 0.03 * tally.tried


def check_value(base: dict[str, Any], key: str, value: Any) -> str:
    cfg = deepcopy(base)
    put(cfg, key, value)
    try:
        check_plain(cfg)
        config, errors = judged(cfg)
        for error in errors:
            raise error
    except ConfigError as error:
        check_refusal(error)
        return "refused"
    assert broken_promises(config) == []
    assert all(line.isprintable() for line in notices(cfg))
    return "taken"


def test_configurations(fuzz: Fuzz) -> None:
    tally = fuzz(configurations(), check_configuration, number=60)
    assert tally.outcomes["taken"] > 0.03 * tally.tried and tally.outcomes["refused"] > 0.03 * tally.tried


def check_configuration(cfg: Any) -> str:
    check_review(cfg)
    try:
        config = parse_config(cfg)
    except ConfigError as error:
        check_refusal(error)
        return "refused"
    assert broken_promises(config) == []
    for line in notices(resolved(cfg)):
        assert "\n" not in line and line.encode()
    return "taken"


def check_refusal(error: ConfigError) -> None:
    # "model.data.train_ds: prompt_template ... lacks {output}" names its key in two words
    section, _, name = (error.key or "the configuration").rpartition(".")
    check_sentence(error, section, name)


def check_review(cfg: Any) -> None:
    """`nemo-spin doctor` says what becomes of each key, whatever it holds."""
    try:
        plain = resolved(cfg)
    except ConfigError:
        return
    assert {found.verdict for found in verdicts(plain)} <= set(VERDICTS)
    for error in judged(plain)[1]:
        check_refusal(error)


@pytest.mark.filterwarnings("ignore")
def test_overrides(fuzz: Fuzz) -> None:
    tally = fuzz(OVERRIDES, check_overriding, number=120)
    assert tally.outcomes["taken"] and tally.outcomes["refused"]


def check_overriding(overrides: list[str]) -> str:
    try:
        config = parse_config(composed(overrides))
    except ConfigError as error:
        check_sentence(error)
        return "refused"
    assert broken_promises(config) == []
    return "taken"


def composed(overrides: list[str]) -> Any:
    """As `nemo-spin train` reads its arguments."""
    check_overrides(overrides)
    register_resolvers()
    given = [f"{key}={value}" for key, value in GIVEN.items()]
    with composing("the configuration"), initialize_config_dir(str(config_dir()), version_base="1.1"):
        return compose("gpt_spin", with_shipped_configurations(addable_overrides([*given, *overrides])))


def test_files(fuzz: Fuzz) -> None:
    fuzz(FILES, check_file, number=25)


def check_file(content: bytes) -> str:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "run.yaml"
        path.write_bytes(content)
        try:
            with composing(str(path)), initialize_config_dir(directory, version_base="1.1"):
                cfg = compose("run")
            parse_config(cfg)
        except ConfigError as error:
            check_sentence(error)
            return "refused"
    return "taken"
