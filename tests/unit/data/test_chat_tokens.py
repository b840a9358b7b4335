"""Conversations in tokens: the same as transformers' own, and as NeMo's chat format written out by hand."""

from __future__ import annotations

import pytest

from nemo_spin.data.encoder import RecordEncoder
from nemo_spin.data.tokenizer import encode_in_two
from nemo_spin.errors import DataError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# no line break between the prompt and an answer that begins with a space
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
TRIMMING = CHATML.replace("m.content", "m.content | trim")
TURNS = [
    {"role": "system", "content": "One two é"},
    {"role": "user", "content": "Hello, how\n\nare you? "},
    {"role": "assistant", "content": " five.\n"},
    {"role": "user", "content": "<tags> 2 + 2"},
    {"role": "assistant", "content": "three\n\n four"},
]


@pytest.mark.parametrize(("template", "end"), [(CHATML, "<|im_end|>"), (PLAIN, "</s>"), (TRIMMING, "<|im_end|>")])
@pytest.mark.parametrize("turns", [TURNS, TURNS[1:3], TURNS[:3]])
def test_messages_have_the_tokens_of_apply_chat_template(bpe_model, bpe_tokenizer, template, end, turns):
    bpe_model.chat_template = template
    encoder = RecordEncoder(bpe_tokenizer)
    encoded = encoder.encode({"messages": turns}, "it")
    whole = bpe_model.apply_chat_template(turns, tokenize=True, return_dict=False)
    prompt = bpe_model.apply_chat_template(turns[:-1], tokenize=True, return_dict=False, add_generation_prompt=True)
    assert encoded.prompt_ids == prompt == encoder.encode_prompt({"messages": turns[:-1]}, "it")
    stop = len(whole) - whole[::-1].index(bpe_model.get_vocab()[end])  # a line break comes after it
    assert encoded.prompt_ids + encoded.response_ids == whole[:stop]
    assert encoded.response_ids[-1] in encoder.stop_ids()


RECORD = {
    "system": "Hello",
    "mask": "User",
    "type": "VALUE_TO_TEXT",
    "conversations": [
        {"from": "User", "value": "how are you?"},
        {"from": "Assistant", "value": "One two", "label": "three"},
        {"from": "User", "value": "four"},
        {"from": "Assistant", "value": "lines and\n é tags", "label": "five"},
    ],
}
PROMPT = (
    "<extra_id_0>System\nHello\n<extra_id_1>User\nhow are you?\n<extra_id_1>Assistant\n<extra_id_2>three\nOne two\n"
    "<extra_id_1>User\nfour\n<extra_id_1>Assistant\n<extra_id_2>five\n"
)
WHOLE = PROMPT + "lines and\n é tags\n<extra_id_1>"


def test_nemo_chat_in_byte_level_bpe(bpe_tokenizer):
    encoded = RecordEncoder(bpe_tokenizer).encode(RECORD, "it")
    assert encoded.prompt_ids == bpe_tokenizer.encode(PROMPT)
    assert encoded.prompt_ids + encoded.response_ids == bpe_tokenizer.encode(WHOLE)
    assert bpe_tokenizer.decode(encoded.response_ids) == "lines and\n é tags\n<extra_id_1>"


def test_nemo_chat_in_sentencepiece(trained_sentencepiece):
    encoder = RecordEncoder(trained_sentencepiece)
    encoded = encoder.encode(RECORD, "it")
    ids = trained_sentencepiece.encode(WHOLE)
    assert encoded.prompt_ids + encoded.response_ids == ids
    assert encoded.response_ids[-1] == trained_sentencepiece.id_of("<extra_id_1>")
    assert encoder.stop_ids() == {trained_sentencepiece.eos_id, ids[-1]}
    response = trained_sentencepiece.decode(encoded.response_ids[:-1])
    assert response.split() == ["lines", "and", "é", "tags"]


def test_a_turn_start_that_is_no_token_is_refused(huggingface_less_bpe):
    with pytest.raises(DataError, match=r"it:3: chat_prompt_tokens.turn_start '<extra_id_1>' is not a single token"):
        RecordEncoder(huggingface_less_bpe).encode(RECORD, "it:3")


def test_a_token_does_not_straddle_the_end_of_the_prompt(bpe_tokenizer):
    vocabulary = bpe_tokenizer.model.get_vocab()
    merged = next(token for token in sorted(vocabulary) if token.isalpha() and token.isascii() and len(token) > 2)
    prompt, response = encode_in_two(bpe_tokenizer, merged[:-1], merged[-1])
    assert bpe_tokenizer.encode(merged) == [vocabulary[merged]]
    assert prompt == bpe_tokenizer.encode(merged[:-1])
    assert response == [vocabulary[merged[-1]]]
