from __future__ import annotations

import pytest

from nemo_spin.data.formats import RecordEncoder, stop_ids
from nemo_spin.errors import ConfigError, DataError

WHERE = "file.jsonl:7"
TURNS = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a b"}]


def turns(*changes: tuple[int, dict]) -> dict:
    messages = [dict(turn) for turn in TURNS]
    for index, change in changes:
        messages[index].update(change)
    return {"messages": messages}


def texts(encoder: RecordEncoder, record: dict) -> tuple[str, str]:
    prompt, response = encoder.encode(record, WHERE)
    return encoder.tokenizer.decode(prompt), encoder.tokenizer.decode(response)


# template records


def test_template_record(tokenizer):
    encoder = RecordEncoder(tokenizer, prompt_template="Q: {input}\nA: {output}", add_bos=True)
    assert texts(encoder, {"input": " why ", "output": "so", "more": 1}) == ("<s>Q: why\nA:", " so</s>")
    assert tokenizer.encoded == ["Q:", " why", "\nA:", " so"]  # each part on its own, once


def test_special_tokens_are_a_choice_and_an_empty_response_needs_its_stop_token(tokenizer):
    assert texts(RecordEncoder(tokenizer), {"input": "x", "output": ""}) == ("x", " </s>")
    encoder = RecordEncoder(tokenizer, prompt_template="{input}\n{output}", add_eos=False)
    assert texts(encoder, {"input": "x", "output": "y"}) == ("x\n", "y")
    with pytest.raises(DataError, match=r"file\.jsonl:7: the response is empty"):
        encoder.encode({"input": "x", "output": " "}, WHERE)


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
    assert tokenizer.encoded == [prompt, "a b"]


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
        (render_plain, "", " \n</s>", {2}),
    ],
)
def test_stop_token_of_other_templates(make_tokenizer, render, content, response, stops):
    tokenizer = make_tokenizer(render=render)
    assert texts(RecordEncoder(tokenizer), turns((2, {"content": content})))[1] == response
    assert stop_ids(tokenizer, chat=True) == stops


def test_stop_ids(tokenizer, make_tokenizer):
    assert stop_ids(tokenizer, chat=False) == {2}
    assert stop_ids(tokenizer, chat=True) == {2, 5}
    with pytest.raises(DataError, match="no chat template"):
        stop_ids(make_tokenizer(render=None), chat=True)


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
        (turns((1, {"content": [{"type": "text"}]})), "messages[1]['content'] must be a string, found a list"),
        (turns((1, {"content": "\0"})), "messages[1]['content'] holds a NUL"),
        ({"prompt_ids": [1]}, "'response_ids' is missing"),
        ({"prompt_ids": [1], "response_ids": []}, "found an empty list"),
        ({"prompt_ids": [1], "response_ids": "1"}, "found a string"),
        (
            {"prompt_ids": [1, 1008], "response_ids": [2]},
            "prompt_ids[1] is 1008: token ids are integers from 0 to 1007",
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
    assert RecordEncoder(tokenizer, add_bos=True).encode(record, WHERE) == ([9, 1007], [0])


# real tokenizers


def test_sentencepiece_gets_no_doubled_space(sentencepiece_tokenizer):
    encoder = RecordEncoder(sentencepiece_tokenizer, prompt_template="Question: {input} Answer: {output}")
    prompt, response = encoder.encode({"input": "A", "output": "B"}, WHERE)
    model = sentencepiece_tokenizer.model
    assert model.decode(prompt + response[:-1]) == "Question: A Answer: B"
    assert prompt + response == [*model.encode("Question: A Answer: B"), model.eos_id()]
    assert stop_ids(sentencepiece_tokenizer, chat=False) == {model.eos_id()}


def test_huggingface_text_and_chat(huggingface_tokenizer):
    encoder = RecordEncoder(huggingface_tokenizer, prompt_template="Question: {input} Answer: {output}")
    model = huggingface_tokenizer.model
    prompt, response = encoder.encode({"input": "A", "output": "B"}, WHERE)
    assert model.decode(prompt + response) == "Question: A Answer: B</s>"

    prompt, response = encoder.encode(turns(), WHERE)
    assert model.decode(prompt) == "system: s</s>\nuser: u</s>\nassistant:"
    assert model.decode(response) == " a b</s>"
    assert response.count(model.eos_token_id) == 1
    assert stop_ids(huggingface_tokenizer, chat=True) == {model.eos_token_id}
