"""The named chat templates: what they write, and that exactly the answers and their end tokens are learned."""

import copy
import logging

import pytest

pytest.importorskip("transformers", reason="needs the trainer extra")

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from finetune_trainer.data.records import BadRowError, Conversation
from finetune_trainer.data.render import Renderer
from finetune_trainer.templates import TEMPLATES, use_template
from tests.trainer.test_data_render import CHINESE, MULTI, SINGLE, byte_level, conversation, learned, metaspace, tokens

CHAT = conversation("Hi", "Hello!", "Bye", "Bye!", system="Be kind.")

WRITTEN = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye!<|im_end|>\n",
    "qwen": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\nBye!<|im_end|>\n",
    "alpaca": "Be kind.\n\n### Instruction:\nHi\n\n### Response:\nHello!</s>\n\n### Instruction:\nBye\n\n### Response:"
    "\nBye!</s>\n\n",
    "guanaco": "Be kind.\n\n### Human: Hi\n### Assistant: Hello!</s>\n### Human: Bye\n### Assistant: Bye!</s>\n",
    "chatglm": "Be kind.\n[Round 0]\n问：Hi\n答：Hello!</s>\n[Round 1]\n问：Bye\n答：Bye!</s>\n",
    "claude": "Be kind.\n\nHuman: Hi\n\nAssistant: Hello!</s>\n\nHuman: Bye\n\nAssistant: Bye!</s>",
    "vicuna": "Be kind. USER: Hi ASSISTANT: Hello!</s>USER: Bye ASSISTANT: Bye!</s>",
    "zephyr": "<|system|>\nBe kind.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye</s>\n<|assistant|>"
    "\nBye!</s>\n",
    "llama-2": "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] Bye [/INST] Bye! </s>",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nBye!"
    "<|eot_id|>",
    "mistral": "<s>[INST] Be kind.\n\nHi [/INST] Hello!</s>[INST] Bye [/INST] Bye!</s>",
    "gemma": "<s><start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\nBye!<end_of_turn>\n",
    "phi": "<|system|>\nBe kind.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nBye<|end|>\n"
    "<|assistant|>\nBye!<|end|>\n",
}
"""As the model families publish them."""


def tokenizer_for(name: str, make) -> PreTrainedTokenizerFast:
    """A tokenizer that has the template's tokens, as the family's own has."""
    tokenizer = copy.deepcopy(make("x"))
    tokenizer.add_special_tokens({"additional_special_tokens": list(TEMPLATES[name].marks)})
    use_template(tokenizer, name)
    return tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_template_writes(name):
    tokenizer = tokenizer_for(name, byte_level)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == WRITTEN[name]
    asked = tokenizer.apply_chat_template(CHAT[:-1], tokenize=False, add_generation_prompt=True)
    assert WRITTEN[name].startswith(asked) and WRITTEN[name][len(asked) :].strip().startswith("Bye!")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_exactly_the_answers_and_their_end_tokens_are_learned(name, make):
    tokenizer = tokenizer_for(name, make)
    end = TEMPLATES[name].end or "</s>"
    assert tokenizer.eos_token == end
    for messages in (SINGLE, CHINESE, MULTI, conversation("法国的首都？", "巴黎。\n\n巴黎是首都。")):
        [row] = tokens(tokenizer, messages)
        # some write a space before an answer (the model writes it), Llama 2 one before the end token too
        said = [text.removeprefix(" ").replace(f" {end}", end) for text in learned(tokenizer, row)]
        assert said == [m["content"] + end for m in messages if m["role"] == "assistant"]
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert row.ids[: len(asked)].tolist() == list(asked), "the prompt is tokenised as when the model is asked"


@pytest.mark.parametrize("name", ["chatml", "llama-3", "alpaca"])
def test_the_chosen_template_and_its_end_token_go_into_the_written_tokenizer(name, tmp_path):
    tokenizer_for(name, byte_level).save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == TEMPLATES[name].jinja
    assert again.eos_token == (TEMPLATES[name].end or "</s>")


def test_a_tokenizer_without_the_templates_tokens_is_told_and_still_learns_to_stop(caplog):
    tokenizer = copy.deepcopy(byte_level("x"))
    with caplog.at_level(logging.WARNING):
        use_template(tokenizer, "gemma")
    assert "<start_of_turn>, <end_of_turn>, which the tokenizer has no tokens for" in caplog.text
    [row] = tokens(tokenizer, SINGLE)
    assert learned(tokenizer, row) == ["I am a small assistant.<end_of_turn></s>"]


TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}


def test_tools_are_written_and_calls_are_learned():
    tokenizer = tokenizer_for("qwen", byte_level)
    messages = [
        {"role": "user", "content": "天气？"},
        {"role": "assistant", "content": "", "tool_calls": [CALL, CALL]},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "晴。"},
    ]
    renderer = Renderer(tokenizer)
    [text] = renderer.render(Conversation(messages, TOOLS))
    assert '<tools>\n{"type": "function", "function": {"name": "weather"' in text.text
    assert "<tool_response>\nsun\n</tool_response>\n<tool_response>\nrain\n</tool_response><|im_end|>" in text.text
    [row] = renderer.encode([text])
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "北京"}}\n</tool_call>'
    assert learned(tokenizer, row) == [f"{call}\n{call}<|im_end|>", "晴。<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "messages", "tools", "complaint"),
    [
        ("chatml", SINGLE, TOOLS, "the row has tools, which the chat template does not write"),
        ("chatml", [SINGLE[0], SINGLE[1] | {"tool_calls": [CALL]}], [], "the row has tool_calls"),
        ("alpaca", [SINGLE[0], {"role": "tool", "content": "x"}, SINGLE[1]], [], "turns of user and assistant only"),
    ],
)
def test_nothing_of_a_row_is_left_out_without_a_word(name, messages, tools, complaint):
    with pytest.raises(BadRowError, match=complaint):
        Renderer(tokenizer_for(name, byte_level)).render(Conversation(messages, tools))
