"""What is learned of a conversation: the assistant's words and their end token, whatever the chat template.

The templates are those of published models, shortened to what matters here; the tokenizers are made on the spot.
"""

import logging
import re
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs the trainer extra")

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from finetune_trainer.data.records import BadRowError, Conversation, Message
from finetune_trainer.data.render import Renderer, Tokens, check_vocabulary
from finetune_trainer.outcome import RunError
from finetune_trainer.templates import TEMPLATES, use_template

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


# --- nothing that is said is lost -------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome", "days": 2, "wind": None}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CALLS_OF_NOTHING = (  # as DeepSeek's: calls are written only where there is no content at all
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and m.content is none %}"
    "{% for c in m.tool_calls %}{{ 'CALL ' + c.function.name + ' ' + (c.function.arguments | tojson) }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKS = CHATML.replace("m.content +", "('<think>' + m.NAME + '</think>' if m.NAME else '') + m.content +")
CUTS = CHATML.replace("m.content", "m.content.split('</think>')[-1]")


def asked(**answer) -> list[Message]:
    return [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "", **answer}]


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_thoughts_are_written_by_whatever_name_the_template_has_for_them(name):
    tokenizer = byte_level(THINKS.replace("NAME", name))
    [row] = tokens(tokenizer, asked(content="42", reasoning_content="Six times seven."))
    assert learned(tokenizer, row) == ["<think>Six times seven.</think>42<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "answer", "lost"),
    [
        (CHATML, {"content": "42", "reasoning_content": "Six times seven."}, "answer's reasoning_content"),
        (CUTS, {"content": "<think>\nSix times seven.\n</think>\n\n42"}, "answer's content"),
        (CHATML + "{# tool_calls #}", {"content": "Wait.", "tool_calls": [CALL]}, "answer's tool_calls"),
    ],
    ids=["thoughts beside", "thoughts within", "a call"],
)
def test_an_answer_of_which_the_template_leaves_out_a_part_is_refused(template, answer, lost):
    with pytest.raises(BadRowError, match=rf"does not write all of the {lost}.*data\.chat_template"):
        tokens(byte_level(template), asked(**answer))
    # a judge scores what its own template writes
    assert Renderer(byte_level(template), lossless=False).render(Conversation(asked(**answer)))
    # and what is not learned may be left out
    muted = [*asked(**answer, train=False), *conversation("Who?", "I am.")]
    assert len(tokens(byte_level(template), muted)) == 1


def test_thoughts_within_an_answer_may_be_written_with_other_white_space():
    tokenizer = byte_level(QWEN3)
    [row] = tokens(tokenizer, asked(content="<think>Six times seven.</think>42"))
    assert learned(tokenizer, row) == ["<think>\nSix times seven.\n</think>\n\n42<|im_end|>"]


def test_a_call_is_written_also_where_the_template_wants_no_content_at_all():
    tokenizer = byte_level(CALLS_OF_NOTHING)
    [row] = tokens(tokenizer, asked(tool_calls=[CALL]))
    assert learned(tokenizer, row) == ['CALL weather {"city": "Rome", "days": 2, "wind": null}<|im_end|>']


def test_of_two_templates_the_one_for_tools_writes_calls_also_without_a_list_of_functions():
    tokenizer = byte_level("x")
    tokenizer.chat_template = {"default": CHATML, "tool_use": TEMPLATES["qwen"].jinja}
    for tools in ([], TOOLS):
        [text] = Renderer(tokenizer).render(Conversation(asked(tool_calls=[CALL]), tools))
        assert '"name": "weather"' in text.text[slice(*text.spans[0])]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", ["", "Be short."])
def test_of_a_conversation_that_the_assistant_begins_no_header_is_learned(name, system):
    tokenizer = byte_level(TEMPLATES[name].jinja)
    messages = [{"role": "assistant", "content": "Welcome!"}, *conversation("Hi", "Hello")]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    try:
        rows = tokens(tokenizer, messages)
    except BadRowError as error:
        assert "refuses the conversation" in str(error) or "cannot be told" in str(error)
        return
    said = [re.sub(r"<[^>]*>", "", text).strip() for row in rows for text in learned(tokenizer, row)]
    assert said == ["Welcome!", "Hello"]


def test_an_answer_that_ends_in_an_added_token_gets_its_end_token_too():
    tokenizer = byte_level(UNENDED)
    tokenizer.add_tokens(["</call>"])
    for answer in ("It rains.", "<call>weather</call>"):
        [row] = tokens(tokenizer, conversation("Rome?", answer))
        assert learned(tokenizer, row) == [f" {answer}</s>"]


# --- the templates that models are published with, as TRL ships them --------------------------------------------------

CALLED = CALL | {"id": "call00001"}
SAID = {
    "one": conversation("Who?", "Nova one."),
    "two": conversation("Who?", "Nova one.", "And?", "Nova two."),
    "system": conversation("Who?", "Nova one.", system="Be short."),
    "answer first": [{"role": "assistant", "content": "Welcome."}, *conversation("Who?", "Nova one.")],
    "thoughts beside": asked(content="Nova one.", reasoning_content="Six times."),
    "thoughts within": asked(content="<think>\nSix times.\n</think>\n\nNova one."),
    "call": asked(tool_calls=[CALLED]),
    "call and words": [
        *asked(content="Let me see.", tool_calls=[CALLED]),
        {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "Nova two."},
    ],
}
OF_PICTURES = {"idefics3", "smolvlm", "llava_next"}
"""They take lists of texts and pictures only."""


def published() -> dict[str, str]:
    folder = Path(str(pytest.importorskip("trl").__file__)).parent / "chat_templates"
    return {file.stem: file.read_text() for file in folder.glob("*.jinja") if not file.stem.endswith("_training")}


@pytest.mark.parametrize("kind", SAID)
def test_with_published_templates_nothing_said_is_lost_and_nothing_else_is_learned(kind):
    messages, tools = SAID[kind], TOOLS if "call" in kind else []
    answers = [message for message in messages if message["role"] == "assistant"]
    accepted = []
    for name, template in published().items():
        try:
            texts = Renderer(byte_level(template)).render(Conversation(messages, tools))
        except BadRowError:
            continue
        accepted.append(name)
        spans = [text.text[slice(*span)] for text in texts for span in text.spans]
        assert len(spans) == len(answers), name
        for span, answer in zip(spans, answers, strict=True):
            for word in re.findall(r"\w+", f"{answer['content']} {answer.get('reasoning_content', '')}"):
                assert word in span, (name, word)
            assert "tool_calls" not in answer or re.search("weather.*city.*Rome.*days.*2", span, re.DOTALL), name
            assert not re.search(r"Who|And|6\*7|Be short|rain(?!s)|<\|im_start\|>", span), (name, span)
        assert spans[-1].endswith("</s>") or re.search(r"<\S*(end|eot|eos|turn|return)\S*>\s*$", spans[-1]), name
    assert len(accepted) >= (12 if kind in ("thoughts beside", "call and words") else 18), accepted
    if kind in ("one", "two"):
        assert set(published()) - set(accepted) == OF_PICTURES
