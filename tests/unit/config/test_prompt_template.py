from __future__ import annotations

import pytest

from nemo_spin.config.prompt_template import check_template, parse_template
from nemo_spin.data.template_records import fill_template
from nemo_spin.errors import ConfigError

NEMO = "Context:  {context} Question: {question} Answer: {label}"  # the example in NeMo's own documentation


def fill(template: str, label_key: str, space_sensitive: bool, **values: str) -> list[str]:
    return fill_template(parse_template(template, label_key), values, space_sensitive)


@pytest.mark.parametrize(
    ("template", "space_sensitive", "expected"),
    [
        (NEMO, True, ["Context:", "  xxx", " Question:", " yyy", " Answer:", " zzz"]),
        (NEMO, False, ["Context:", " xxx", "Question:", "yyy", "Answer:", "zzz"]),
        ("{context} {label}", True, ["xxx", " zzz"]),
        ("{context} {label}", False, ["xxx", "zzz"]),
        ("{context}{label}", True, ["xxx", "zzz"]),
        ("  Q:\t{context}\n\nA:   {label}", True, ["  Q:\t", "xxx", "\n\nA:", "   zzz"]),
        ("  Q:\t{context}\n\nA:   {label}", False, [" Q:\t", "xxx", "\n\nA:", "  zzz"]),
        (r"é {context}\nA:\t{label}", True, ["é", " xxx", "\nA:\t", "zzz"]),
        ("{context} {context} {label}", True, ["xxx", " xxx", " zzz"]),
    ],
)
def test_splitting(template, space_sensitive, expected):
    # values lose the spaces around them, and only spaces
    assert fill(template, "label", space_sensitive, context="  xxx ", question=" yyy", label="zzz  ") == expected


def test_values_are_not_templates():
    values = {"input": "{output}", "output": "\n{input} \\n"}
    assert fill("{input}:{output}", "output", True, **values) == ["{output}", ":", "\n{input} \\n"]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{input}", "lacks {output}"),
        ("", "lacks {output}"),
        ("{output} {input}", "must end with {output}"),
        ("{input} {output} ", "must end with {output}"),
        ("{input} {output} {output}", "2 times"),
        ("{input {output}", "brace"),
        ("{} {output}", "brace"),
        ("{{input}} {output}", "brace"),
        ("{ input } {output}", "write {input}"),
        (r"\ud800 {output}", "surrogate"),
        (None, "must be a string"),
    ],
)
def test_templates_that_are_refused(template, says):
    with pytest.raises(ConfigError) as caught:
        check_template(template, "output")
    assert says in str(caught.value)


def test_templates_that_are_accepted():
    check_template("{input} {output}", "output")
    check_template("{user question}\n{answer}", "answer")
