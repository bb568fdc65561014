"""The chat templates that ``data.chat_template`` names, each as its model family publishes it (where it has one).

Every template writes a system prompt, any number of turns, and the end of an answer right behind it. Where a family
has no place for a system prompt, it stands before the first question. What is learned of an answer is found in
``data/render.py``. Called by ``model.py``, which puts the chosen one into the tokenizer.
"""

import logging
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Template:
    """One way to write a conversation."""

    jinja: str
    end: str = ""
    """The token that ends an answer; "": the tokenizer's end token."""
    marks: tuple[str, ...] = ()
    """Tokens that it was made for; a tokenizer without them writes them in pieces."""


_SYSTEM_FIRST = (
    "{%- if messages[0]['role'] in ('system', 'developer') %}{%- set system = messages[0]['content'] %}"
    "{%- set turns = messages[1:] %}{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
)
"""``system`` and the other ``turns``."""

_ONLY_TURNS = (
    "{%- for m in turns %}{%- if m['role'] not in ('user', 'assistant') %}"
    "{{- raise_exception('this template writes turns of user and assistant only, and a system prompt in front') }}"
    "{%- endif %}{%- endfor %}"
)


_QUESTION_FIRST = (
    "{%- if system and turns and turns[0]['role'] != 'user' %}{{- raise_exception('this template writes the system "
    "prompt into the first question, and the conversation begins with an answer') }}{%- endif %}"
)


def _plain(before: str, user: str, assistant: str, after: str = "", system: str = "{{- system + '\\n\\n' }}") -> str:
    """A template of running text. ``assistant`` is what a prompt ends with; the answer follows after one space
    where ``after`` says so."""
    return (
        _SYSTEM_FIRST
        + _ONLY_TURNS
        + "{%- if system %}"
        + system
        + "{%- else %}{{- "
        + before
        + " }}{%- endif %}"
        + "{%- for m in turns %}{%- if m['role'] == 'user' %}{{- "
        + user
        + " }}{%- else %}{{- "
        + assistant
        + " + "
        + after
        + " }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- "
        + assistant
        + " }}{%- endif %}"
    )


_CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

_QWEN = (  # Qwen2.5's, its default system prompt that of Qwen2
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = 'You are a helpful assistant.' %}{%- set turns = messages %}{%- endif %}"
    "{{- '<|im_start|>system\\n' + system }}"
    "{%- if tools %}"
    "{{- '\\n\\n# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\n"
    "You are provided with function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    "{{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": '
    "<args-json-object>}\\n</tool_call>' }}"
    "{%- endif %}{{- '<|im_end|>\\n' }}"
    "{%- for m in turns %}"
    "{%- if m['role'] == 'tool' %}"
    "{%- if loop.first or turns[loop.index0 - 1]['role'] != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + m['content'] + '\\n</tool_response>' }}"
    "{%- if loop.last or turns[loop.index0 + 1]['role'] != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- elif m['role'] == 'assistant' and m['tool_calls'] %}"
    "{{- '<|im_start|>assistant' }}{%- if m['content'] %}{{- '\\n' + m['content'] }}{%- endif %}"
    "{%- for call in m['tool_calls'] %}{%- set call = call['function'] or call %}"
    "{{- '\\n<tool_call>\\n{\"name\": \"' + call['name'] + '\", \"arguments\": ' }}{{- call['arguments'] | tojson }}"
    "{{- '}\\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

_LLAMA_2 = (
    "{%- if messages[0]['role'] in ('system', 'developer') %}"
    "{%- set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{%- set turns = messages[1:] %}"
    "{%- else %}{%- set system = '' %}{%- set turns = messages %}{%- endif %}"
    + _ONLY_TURNS
    + _QUESTION_FIRST
    + "{%- for m in turns %}{%- if m['role'] == 'user' %}"
    "{{- (bos_token or '') + '[INST] ' + (system if loop.first else '') + m['content'] | trim + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m['content'] | trim + ' ' + eos_token }}{%- endif %}{%- endfor %}"
)

_LLAMA_3 = (
    "{{- bos_token or '' }}{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)

_MISTRAL = (  # of Mistral-7B-Instruct v0.1 to v0.3; the system prompt before the first question
    _SYSTEM_FIRST
    + _ONLY_TURNS
    + _QUESTION_FIRST
    + "{{- bos_token or '' }}{%- for m in turns %}{%- if m['role'] == 'user' %}"
    "{{- '[INST] ' + (system + '\\n\\n' if system and loop.first else '') + m['content'] + ' [/INST]' }}"
    "{%- else %}{{- ' ' + m['content'] + eos_token }}{%- endif %}{%- endfor %}"
)

_GEMMA = (  # the system prompt before the first question, as of Gemma 3
    _SYSTEM_FIRST + _ONLY_TURNS + _QUESTION_FIRST + "{{- bos_token or '' }}{%- for m in turns %}"
    "{{- '<start_of_turn>' + ('model' if m['role'] == 'assistant' else 'user') + '\\n' }}"
    "{{- (system + '\\n\\n' if system and loop.first else '') + m['content'] | trim + '<end_of_turn>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"
)

_PHI = (
    "{%- for m in messages %}{{- '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)

_ZEPHYR = (
    "{%- for m in messages %}{{- '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"
)

_CHATGLM = (  # ChatGLM-6B
    _SYSTEM_FIRST
    + _ONLY_TURNS
    + "{%- if system %}{{- system + '\\n' }}{%- endif %}{%- set ns = namespace(round=0) %}{%- for m in turns %}"
    "{%- if m['role'] == 'user' %}{{- '[Round ' ~ ns.round ~ ']\\n问：' + m['content'] + '\\n答：' }}"
    "{%- else %}{{- m['content'] + eos_token + '\\n' }}{%- set ns.round = ns.round + 1 %}{%- endif %}{%- endfor %}"
)

_ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n"
)
_VICUNA_PREAMBLE = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user\\'s questions. "
)

TEMPLATES: dict[str, Template] = {
    "chatml": Template(_CHATML, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "alpaca": Template(
        _plain(
            f"'{_ALPACA_PREAMBLE}'",
            "'### Instruction:\\n' + m['content'] + '\\n\\n'",
            "'### Response:\\n'",
            "m['content'] + eos_token + '\\n\\n'",
        )
    ),
    "guanaco": Template(
        _plain(
            "''", "'### Human: ' + m['content'] + '\\n'", "'### Assistant:'", "' ' + m['content'] + eos_token + '\\n'"
        )
    ),
    "chatglm": Template(_CHATGLM),
    "claude": Template(
        _plain(
            "''",
            "'\\n\\nHuman: ' + m['content']",
            "'\\n\\nAssistant:'",
            "' ' + m['content'] + eos_token",
            system="{{- system }}",
        )
    ),
    "vicuna": Template(
        _plain(
            f"'{_VICUNA_PREAMBLE}'",
            "'USER: ' + m['content'] + ' '",
            "'ASSISTANT:'",
            "' ' + m['content'] + eos_token",
            system="{{- system + ' ' }}",
        )
    ),
    "zephyr": Template(_ZEPHYR),
    "llama-2": Template(_LLAMA_2),
    "llama-3": Template(_LLAMA_3, "<|eot_id|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "qwen": Template(_QWEN, "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
    "mistral": Template(_MISTRAL),
    "gemma": Template(_GEMMA, "<end_of_turn>", ("<start_of_turn>", "<end_of_turn>")),
    "phi": Template(_PHI, "<|end|>", ("<|user|>", "<|assistant|>", "<|end|>")),
}

PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)
"""For models that were never taught to chat. It goes into the written tokenizer, so that the result is asked as
it was taught."""


def use_template(tokenizer: PreTrainedTokenizerBase, wanted: str) -> None:
    """Give the tokenizer the template: ``wanted`` is a name, a Jinja text, or "" for the tokenizer's own.

    Where a named template ends answers by a token the tokenizer knows, that becomes its end token: generation stops
    there.
    """
    named = TEMPLATES.get(wanted)
    if named is None:
        if wanted:
            tokenizer.chat_template = wanted
        elif not tokenizer.chat_template:
            log.warning("the tokenizer has no chat template; using a plain one with '### User:' and '### Assistant:'")
            tokenizer.chat_template = PLAIN
        return
    tokenizer.chat_template = named.jinja
    vocabulary = tokenizer.get_vocab()
    unknown = [mark for mark in named.marks if mark not in vocabulary]
    if unknown:
        log.warning(
            "the template %s writes %s, which the tokenizer has no tokens for: they are written in pieces, and every "
            "answer gets the end token %r. A template of the model's own family is better.",
            wanted,
            ", ".join(unknown),
            tokenizer.eos_token,
        )
    if named.end in vocabulary and tokenizer.eos_token != named.end:
        log.info("answers end with %r, the end token of the template %s", named.end, wanted)
        tokenizer.eos_token = named.end
