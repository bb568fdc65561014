"""What is learned of a conversation: the assistant's words and their end token, whatever the chat template.

The templates are those of published models, shortened to what matters here; the tokenizers are made on the spot.
"""

import logging
from functools import lru_cache

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the trainer extra")

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.records import BadRowError, Conversation, Message
from finetune_trainer.data.render import Renderer, Tokens, check_vocabulary
from finetune_trainer.outcome import RunError
from finetune_trainer.templates import use_template

TEXT = [
    "Who are you? I am a small assistant. What is the capital of France? Paris is the capital of France.",
    "你是谁？我是一个小助手。法国的首都是哪里？巴黎是法国的首都。",
    "Count to three: one, two, three.\nThen stop. And? yes Be short.",
]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start|>' + m.role + '<|stop|>\n\n' + m.content | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|stop|>\n\n' }}{% endif %}"
)
MISTRAL = (  # the system prompt stands in the first user message; an answer begins with a space
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}"
    "{% elif m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (  # the system prompt moves to the last user message
    "{{ bos_token }}{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% endif %}{% endfor %}"
    "{% set last = messages | selectattr('role', 'equalto', 'user') | list | last %}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + (ns.system if m == last else '') + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # thoughts of earlier turns are dropped, the last answer always shows some
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% set answer = m.content.split('</think>')[-1].lstrip('\n') %}{% if loop.index0 > ns.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + answer }}"
    "{% else %}{{ answer }}{% endif %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
R1 = (  # the prompt opens the thoughts for the model, published answers do not show them
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|user|>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<|assistant|>' + m.content + eos_token }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)
GEMMA = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content | trim + '<|stop|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
UNENDED = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|start|>", "<|stop|>", "<|user|>", "<|assistant|>", "<s>", "</s>"]


@lru_cache
def byte_level(template: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of Llama 3, Qwen and SmolLM: a Chinese character may be several tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    raw.train_from_iterator(
        TEXT[:1], trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    raw.add_special_tokens([AddedToken(token) for token in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def metaspace(template: str) -> PreTrainedTokenizerFast:
    """Spaces become a visible character that begins a word, as of Llama 2, Mistral and Gemma."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.ByteFallback()])
    raw.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", *SPECIAL]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def conversation(*turns: str, system: str = "") -> list[Message]:
    """Alternating user and assistant turns."""
    roles = ("user", "assistant")
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": roles[number % 2], "content": turn} for number, turn in enumerate(turns)]


def tokens(tokenizer: PreTrainedTokenizerFast, messages: list[Message]) -> list[Tokens]:
    renderer = Renderer(tokenizer)
    return list(renderer.encode(renderer.render(Conversation(messages))))


def learned(tokenizer: PreTrainedTokenizerFast, row: Tokens) -> list[str]:
    """The text of every run of learned tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.learned.astype(np.int8), [0]])))
    return [tokenizer.decode(row.ids[start:end]) for start, end in edges.reshape(-1, 2)]


SINGLE = conversation("Who are you?", "I am a small assistant.")
CHINESE = conversation("你是谁？", "我是一个小助手。", system="你是助手。")
MULTI = conversation(
    "Who are you?", "I am  you.\n\nAnd?", "法国的首都是哪里？", "巴黎。", "yes", "yes", system="Be short."
)


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize(
    ("template", "end", "lead"),
    [(CHATML, "<|im_end|>", ""), (MARKED, "<|im_end|>", ""), (LLAMA3, "<|im_end|>", ""), (MISTRAL, "</s>", " ")],
    ids=["chatml", "generation-marked", "llama3", "mistral"],
)
@pytest.mark.parametrize("messages", [SINGLE, CHINESE, MULTI], ids=["single", "chinese", "multi"])
def test_exactly_the_answers_and_their_end_tokens_are_learned(make, template, end, lead, messages):
    tokenizer = make(template)
    [row] = tokens(tokenizer, messages)
    answers = [m["content"] for m in messages if m["role"] == "assistant"]
    # decode() of a Metaspace tokenizer drops the space in front of a text
    assert [text.removeprefix(lead) for text in learned(tokenizer, row)] == [answer + end for answer in answers]
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    assert row.ids.tolist() == list(whole)


@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_the_prompt_before_an_answer_is_tokenised_as_it_is_when_the_model_is_asked(make):
    for template in (CHATML, LLAMA3, MISTRAL):
        tokenizer = make(template)
        [row] = tokens(tokenizer, CHINESE)
        asked = tokenizer.apply_chat_template(CHINESE[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row.ids[: int(np.argmax(row.learned))].tolist() == list(asked)


def test_a_template_that_drops_earlier_thoughts_gives_one_sequence_per_answer():
    tokenizer = byte_level(QWEN3)
    messages = conversation("Who?", "<think>\nhm\n</think>\n\nI am.", "And you?", "Paris.")
    first, second = tokens(tokenizer, messages)
    assert learned(tokenizer, first) == ["<think>\nhm\n</think>\n\nI am.<|im_end|>"]
    assert learned(tokenizer, second) == ["<think>\n\n</think>\n\nParis.<|im_end|>"]
    assert "hm" not in tokenizer.decode(second.ids), "what the model will not see again must not be seen here"


def test_a_template_that_moves_the_system_prompt_gives_one_sequence_per_answer():
    tokenizer = metaspace(MISTRAL_V3)
    rows = tokens(tokenizer, MULTI)
    assert [learned(tokenizer, row)[0].strip() for row in rows] == ["I am  you.\n\nAnd?</s>", "巴黎。</s>", "yes</s>"]
    assert all(tokenizer.decode(row.ids).count("Be short.") == 1 for row in rows)


def test_a_prompt_that_opens_the_thoughts_does_not_hide_the_answer():
    tokenizer = byte_level(R1)
    [row] = tokens(tokenizer, MULTI)
    assert learned(tokenizer, row) == ["I am  you.\n\nAnd?</s>", "巴黎。</s>", "yes</s>"]


def test_an_answer_that_repeats_its_question_is_learned_once():
    tokenizer = byte_level(CHATML)
    [row] = tokens(tokenizer, conversation("yes", "yes", "yes", "yes"))
    assert learned(tokenizer, row) == ["yes<|im_end|>"] * 2


def test_an_end_token_is_added_where_the_template_writes_none():
    tokenizer = byte_level(UNENDED)
    [row] = tokens(tokenizer, SINGLE)
    assert learned(tokenizer, row) == [" I am a small assistant.</s>"]


def test_a_base_model_gets_a_plain_template_and_a_log_line(caplog):
    tokenizer = byte_level("x")
    tokenizer.chat_template = None
    with caplog.at_level(logging.WARNING):
        use_template(tokenizer, "")
    assert "no chat template" in caplog.text
    [row] = tokens(tokenizer, MULTI)
    assert learned(tokenizer, row) == ["I am  you.\n\nAnd?</s>", "巴黎。</s>", "yes</s>"]
    assert tokenizer.apply_chat_template(SINGLE[:1], tokenize=False, add_generation_prompt=True).endswith(
        "Assistant:\n"
    )


def test_an_answer_of_weight_0_is_not_learned():
    tokenizer = byte_level(CHATML)
    messages = [dict(message) for message in MULTI]
    messages[2]["train"] = False
    [row] = tokens(tokenizer, messages)
    assert learned(tokenizer, row) == ["巴黎。<|im_end|>", "yes<|im_end|>"]


def test_a_conversation_the_template_refuses_says_why():
    with pytest.raises(
        BadRowError, match=r"refuses the conversation \(system, user, assistant\): System role not supp"
    ):
        tokens(byte_level(GEMMA), CHINESE)


def test_a_template_that_shows_no_answers_is_refused():
    silent = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(BadRowError, match=r"data\.chat_template"):
        tokens(byte_level(silent), SINGLE)


def test_a_tokenizer_without_offsets_learns_the_same():
    fast = byte_level(CHATML)
    renderer = Renderer(fast)
    for messages in (SINGLE, CHINESE, MULTI):
        texts = renderer.render(Conversation(messages))
        [quick] = renderer.encode(texts)
        slow = renderer._encode_slow(texts[0])
        assert slow.ids.tolist() == quick.ids.tolist()
        assert slow.learned.tolist() == quick.learned.tolist()


def test_tokens_without_an_embedding_are_refused():
    with pytest.raises(RunError, match="token 64, but the model has embeddings for 0 to 63"):
        check_vocabulary(64, 64, "file:///model")
    check_vocabulary(63, 64, "file:///model")
