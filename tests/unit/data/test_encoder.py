from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemo_spin.config.dataset import ChatPromptTokens
from nemo_spin.data.encoder import RecordEncoder
from nemo_spin.errors import ConfigError, DataError

WHERE = "file.jsonl:7"


def talk(value="there", label=None, **more) -> dict:
    answer = {"from": "Assistant", "value": value, "label": label}
    return {"conversations": [{"from": "User", "value": "hello"}, answer], **more}


TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a b"}]


def turns(*changes: tuple[int, dict]) -> dict:
    messages = [dict(turn) for turn in TURNS]
    for index, change in changes:
        messages[index].update(change)
    return {"messages": messages}


def texts(encoder: RecordEncoder, record: dict) -> tuple[str, str]:
    encoded = encoder.encode(record, WHERE)
    return encoder.tokenizer.decode(encoded.prompt_ids), encoder.tokenizer.decode(encoded.response_ids)


# what is trained, marked by hand: each file holds {"options", "record"}, a line of dashes, and prompt«response»

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_golden(tokenizer, path):
    given, marked = path.read_text(encoding="utf-8").split("\n---\n")
    given = json.loads(given)
    options = given.get("options", {})
    if "chat_prompt_tokens" in options:
        options["chat_prompt_tokens"] = ChatPromptTokens(**options["chat_prompt_tokens"])
    encoder = RecordEncoder(tokenizer, **options)
    encoded = encoder.encode(given["record"], WHERE)
    prompt, response = tokenizer.decode(encoded.prompt_ids), tokenizer.decode(encoded.response_ids)
    text = f"{prompt}«{response}»"
    if encoded.rejected_ids is not None:
        text += f"\nrejected «{tokenizer.decode(encoded.rejected_ids)}»"
    assert text == marked.removesuffix("\n")
    assert encoder.encode_prompt(given["record"], WHERE) == encoded.prompt_ids
    stop = encoded.response_ids[-1]
    assert stop in encoder.stop_ids() and tokenizer.decode([stop]) == given["stop"]


def test_there_is_a_golden_file_for_every_format():
    stems = {path.stem for path in GOLDEN}
    assert stems >= {"template", "messages", "conversations", "value_to_text", "text_to_value", "pairs", "ids"}


# template records


def test_template_record(tokenizer):
    encoder = RecordEncoder(tokenizer, prompt_template="Q: {input}\nA: {output}", add_bos=True)
    assert texts(encoder, {"input": " why ", "output": "so", "more": 1}) == ("<s>Q: why\nA:", " so</s>")
    assert tokenizer.encoded == ["Q:", " why", "\nA:", " so"]  # each part on its own, once


def test_the_stop_token_is_a_choice(tokenizer):
    encoder = RecordEncoder(tokenizer, prompt_template="{input}\n{output}", add_eos=False)
    assert texts(encoder, {"input": "x", "output": "y"}) == ("x\n", "y")


def test_bos_needs_a_bos_token(tokenizer):
    tokenizer.bos_id = None
    with pytest.raises(ConfigError, match="add_bos: false"):
        RecordEncoder(tokenizer, add_bos=True)


def test_an_empty_prompt_predicts_nothing(tokenizer):
    record = {"output": "y"}
    with pytest.raises(DataError, match="the prompt is empty"):
        RecordEncoder(tokenizer, prompt_template="{output}").encode(record, WHERE)
    encoder = RecordEncoder(tokenizer, prompt_template="{output}", add_bos=True)
    assert texts(encoder, record) == ("<s>", "y</s>")


# conversations


def test_the_response_ends_with_the_end_of_turn(tokenizer):
    prompt, response = texts(RecordEncoder(tokenizer, add_bos=True, add_eos=True), turns())
    assert prompt == "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    assert response == "a b<|im_end|>"  # neither the newline after it, nor an end of text, nor a second BOS
    assert tokenizer.encoded == [prompt, prompt + response]  # at once


def render_phi(messages: list[dict], add_generation_prompt: bool) -> str:
    body = "".join(f"{m['role']}: {m['content'].strip()}<|end|>\n" for m in messages)
    return body + ("assistant:" if add_generation_prompt else "</s>")


def render_plain(messages: list[dict], add_generation_prompt: bool) -> str:
    body = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
    return body + ("assistant:" if add_generation_prompt else "")


@pytest.mark.parametrize(
    ("render", "content", "response", "stops"),
    [
        (render_phi, "a<|end|>b ", " a<|end|>b<|end|>", {2, 6}),  # the turn's end, not the end of text after it
        (render_plain, "bold <b>", " bold <b>\n</s>", {2}),  # a token in the content does not end the turn
    ],
)
def test_stop_token_of_other_templates(make_tokenizer, render, content, response, stops):
    tokenizer = make_tokenizer(render=render)
    assert texts(RecordEncoder(tokenizer), turns((2, {"content": content})))[1] == response
    encoder = RecordEncoder(tokenizer)
    texts(encoder, turns())
    assert encoder.stop_ids() == stops


def test_stop_ids_are_those_of_the_records_seen(tokenizer, make_tokenizer):
    encoder = RecordEncoder(tokenizer)
    assert encoder.stop_ids() == {2}
    encoder.encode_prompt({"input": "x"}, WHERE)
    assert encoder.stop_ids() == {2}
    encoder.encode_prompt({"messages": TURNS[:2]}, WHERE)
    assert encoder.stop_ids() == {2, 5}
    encoder.encode_prompt(talk(), WHERE)
    assert encoder.stop_ids() == {2, 5, 9}
    assert encoder.stop_ids(["conversations"]) == {2, 9}
    with pytest.raises(DataError, match="no chat template"):
        RecordEncoder(make_tokenizer(render=None)).stop_ids(["messages"])


def test_a_template_that_rewrites_history_is_refused(make_tokenizer):
    def render(messages: list[dict], add_generation_prompt: bool) -> str:
        return f"{len(messages)} turns\n" + render_plain(messages, add_generation_prompt)

    with pytest.raises(DataError, match=r"file\.jsonl:7: the chat template rewrites history"):
        RecordEncoder(make_tokenizer(render=render)).encode(turns(), WHERE)


def test_a_missing_chat_template_is_reported_with_the_line(make_tokenizer):
    with pytest.raises(DataError, match=r"file\.jsonl:7: the tokenizer has no chat template"):
        RecordEncoder(make_tokenizer(render=None)).encode(turns(), WHERE)


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({}, "the key 'input' of prompt_template is missing"),
        ({"question": "x", "output": "y"}, "has ['question', 'output']"),
        ({"input": 5, "output": "y"}, "'input' must be a string, found a number"),
        ({"input": "x", "output": None}, "'output' must be a string, found null"),
        ({"input": "x\0", "output": "y"}, "'input' holds a NUL"),
        ({"input": "x", "output": "y\ud83d"}, "'output' holds half of a surrogate pair at character 2"),
        ({"messages": "hello"}, "'messages' must be a list of turns, found a string"),
        ({"messages": []}, "found an empty list"),
        ({"messages": ["hello"]}, "messages[0] must be an object"),
        ({"messages": TURNS[:2]}, "the last turn is 'user'"),
        ({"messages": TURNS[2:]}, "only the assistant's turn"),
        ({"messages": TURNS, "tools": [{}]}, "'tools' are not supported"),
        (turns((1, {"role": "tool"})), "messages[1] is a tool turn"),
        (turns((1, {"role": "function"})), "messages[1] is a function turn"),
        (turns((2, {"content": None, "tool_calls": [{}]})), "messages[2] has 'tool_calls'"),
        (turns((0, {"role": "developer"})), "messages[0] has the role 'developer': use one of system, user, assistant"),
        (turns((0, {"role": {}})), "messages[0] has the role {}"),
        ({"messages": [{"role": "user"}, TURNS[2]]}, "messages[0] has no 'content'"),
        (
            {"messages": [TURNS[1], TURNS[1], TURNS[2]]},
            "messages[1] is a turn of the user where the assistant's is due",
        ),
        (
            {"messages": [TURNS[2], TURNS[1], TURNS[2]]},
            "messages[0] is a turn of the assistant where the user's is due",
        ),
        ({"messages": [TURNS[1], TURNS[0], TURNS[2]]}, "messages[1] is a turn of the system where"),
        ({"messages": TURNS[::2]}, "messages[1] is a turn of the assistant where the user's is due"),
        (turns((2, {"content": " \n"})), "the response is empty: fill messages[2]['content']"),
        ({"input": "x", "output": " "}, "the response is empty: fill 'output'"),
        ({"real": TURNS}, "'generated' is missing"),
        ({"generated": TURNS}, "'real' is missing"),
        ({"real": TURNS, "generated": TURNS[1:]}, "'real' and 'generated' have different prompts"),
        ({"real": TURNS, "generated": TURNS[:2]}, "the last turn is 'user'"),
        ({"real": TURNS, "generated": None}, "'generated' must be a list of turns, found null"),
        ({"conversations": []}, "'conversations' must be a list of turns, found an empty list"),
        ({"conversations": ["x"]}, "conversations[0] must be an object"),
        ({"conversations": [{"from": "User"}]}, "conversations[0] has no 'value'"),
        ({"conversations": [{"value": "x"}]}, "conversations[0] has no 'from'"),
        (talk(value=7), "conversations[1]['value'] must be a string, found a number"),
        (talk(value=" "), "the response is empty: fill conversations[1]['value']"),
        (talk(label=[1]), "conversations[1]['label'] must be a string, found a list"),
        (talk(type="LABEL"), "'type' is 'LABEL': use VALUE_TO_TEXT"),
        (talk(type="TEXT_TO_VALUE"), "conversations[1]['label'] must be a string, found null"),
        (talk(system=1), "'system' must be a string"),
        (
            talk(mask="human"),
            "no turn is from 'human', whom 'mask' leaves out of the training (the turns are from 'User'",
        ),
        (talk(mask="Assistant"), "the last turn is from 'Assistant', whom 'mask' leaves out"),
        (turns((1, {"content": [{"type": "text"}]})), "messages[1]['content'] must be a string, found a list"),
        (turns((1, {"content": "\0"})), "messages[1]['content'] holds a NUL"),
        ({"prompt_ids": [1]}, "'response_ids' is missing"),
        ({"prompt_ids": [1], "response_ids": []}, "found an empty list"),
        ({"prompt_ids": [1], "response_ids": "1"}, "found a string"),
        (
            {"prompt_ids": [1, 1011], "response_ids": [2]},
            "prompt_ids[1] is 1011: token ids are integers from 0 to 1010",
        ),
        ({"prompt_ids": [1], "response_ids": [-1]}, "response_ids[0] is -1"),
        ({"prompt_ids": [1], "response_ids": [True]}, "response_ids[0] is True"),
        ({"prompt_ids": [1.0], "response_ids": [2]}, "prompt_ids[0] is 1.0"),
    ],
)
def test_a_bad_record_is_refused_with_its_line(tokenizer, record, says):
    with pytest.raises(DataError) as caught:
        RecordEncoder(tokenizer).encode(record, WHERE)
    assert str(caught.value).startswith("file.jsonl:7: ")
    assert says in str(caught.value)


def test_ids_are_used_as_they_are(tokenizer):
    record = {"prompt_ids": [9, 1007], "response_ids": [0], "input": "x", "output": "y"}
    encoded = RecordEncoder(tokenizer, add_bos=True).encode(record, WHERE)
    assert (encoded.prompt_ids, encoded.response_ids) == ([9, 1007], [0])


# prompts for generation


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"prompt": " as it is "}, " as it is "),
        ({"input": "q"}, "q"),
        ({"messages": TURNS[1:2]}, "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"),
        ({"messages": TURNS[1:]}, "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"),
        ({"real": TURNS[1:]}, "<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"),
        (
            {"conversations": [{"from": "User", "value": "u"}], "system": "s"},
            "<extra_id_0>System\ns\n<extra_id_1>User\nu\n<extra_id_1>Assistant\n",
        ),
        (
            {"conversations": [{"from": f, "value": f} for f in "abca"], "mask": "a"},
            "<extra_id_0>System\n\n<extra_id_1>a\na\n<extra_id_1>b\nb\n<extra_id_1>c\nc\n<extra_id_1>a\na\n<extra_id_1>c\n",
        ),
    ],
)
def test_a_prompt_needs_no_response(tokenizer, record, prompt):
    assert tokenizer.decode(RecordEncoder(tokenizer).encode_prompt(record, WHERE)) == prompt


def test_a_prompt_of_ids_and_of_a_template_with_a_field_of_that_name(tokenizer):
    assert RecordEncoder(tokenizer).encode_prompt({"prompt_ids": [7]}, WHERE) == [7]
    encoder = RecordEncoder(tokenizer, prompt_template="Q: {prompt}\n{real}", label_key="real", add_bos=True)
    assert tokenizer.decode(encoder.encode_prompt({"prompt": "x"}, WHERE)) == "<s>Q: x\n"
    assert texts(encoder, {"prompt": "x", "real": "y"}) == ("<s>Q: x\n", "y</s>")
    with pytest.raises(DataError, match=r"file\.jsonl:7: the conversation has no user's turn"):
        encoder.encode_prompt({"messages": TURNS[:1]}, WHERE)
    with pytest.raises(DataError, match=r"file\.jsonl:7: the prompt is empty"):
        RecordEncoder(tokenizer).encode_prompt({"prompt": ""}, WHERE)


# truncation


@pytest.mark.parametrize(
    ("fields", "method", "limit", "prompt", "cut"),
    [
        ("a", "right", 10, "0123:AB:", 0),
        ("a", "right", 9, "012:AB:", 1),
        ("a", "left", 9, "123:AB:", 1),
        ("a, b", "right", 8, "012:A:", 2),  # in equal parts
        ("a,b", "left", 7, "23:B:", 3),  # the first one gives more
        ("a,b", "right", 5, "0::", 5),  # b has no more to give
        ("b", "right", 5, "0123::", 2),  # and nothing else may be cut
        (None, "right", 5, "0123:AB:", 0),
    ],
)
def test_truncation_by_tokens(tokenizer, fields, method, limit, prompt, cut):
    encoder = RecordEncoder(
        tokenizer,
        prompt_template="{a}:{b}:{output}",
        truncation_field=fields,
        truncation_method=method,
    )
    encoded = encoder.encode({"a": "0123", "b": "AB", "output": "y"}, WHERE, limit)
    assert (tokenizer.decode(encoded.prompt_ids), encoded.cut) == (prompt, cut)
    assert tokenizer.decode(encoded.response_ids) == "y</s>"


def test_only_fields_of_the_prompt_can_be_cut(tokenizer):
    for field in ("output", "other", "input,other"):
        with pytest.raises(ConfigError, match=r"truncation_field .* is not a field of the prompt: name some of input"):
            RecordEncoder(tokenizer, truncation_field=field)
    with pytest.raises(ConfigError, match="use left or right"):
        RecordEncoder(tokenizer, truncation_method="middle")


# the SPIN release


def test_an_empty_generated_response_has_not_been_generated_yet(tokenizer):
    empty = [*TURNS[:2], {"role": "assistant", "content": ""}]
    encoded = RecordEncoder(tokenizer).encode({"real": TURNS, "generated": empty}, WHERE)
    assert encoded.rejected_ids is None
    assert tokenizer.decode(encoded.response_ids) == "a b<|im_end|>"


# real tokenizers


def test_sentencepiece_gets_no_doubled_space(sentencepiece_tokenizer):
    encoder = RecordEncoder(sentencepiece_tokenizer, prompt_template="Question: {input} Answer: {output}")
    encoded = encoder.encode({"input": "A", "output": "B"}, WHERE)
    model = sentencepiece_tokenizer.model
    ids = encoded.prompt_ids + encoded.response_ids
    assert model.decode(ids[:-1]) == "Question: A Answer: B"
    assert ids == [*model.encode("Question: A Answer: B"), model.eos_id()]
    assert encoder.stop_ids() == {model.eos_id()}


def test_huggingface_text_and_chat(huggingface_tokenizer):
    encoder = RecordEncoder(huggingface_tokenizer, prompt_template="Question: {input} Answer: {output}")
    model = huggingface_tokenizer.model
    assert "".join(texts(encoder, {"input": "A", "output": "B"})) == "Question: A Answer: B</s>"
    assert texts(encoder, turns()) == ("system: s</s>\nuser: u</s>\nassistant:", " a b</s>")
    assert encoder.encode(turns(), WHERE).response_ids.count(model.eos_token_id) == 1
    assert encoder.stop_ids() == {model.eos_token_id}
