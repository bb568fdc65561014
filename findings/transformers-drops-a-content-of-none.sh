#!/usr/bin/env bash
# transformers 5.23.0: apply_chat_template() drops the keys of a message whose value is None before the template sees it.
# Published templates of DeepSeek write calls only of an answer whose content "is none" (an OpenAI answer with calls has
# exactly that). A key that is missing is undefined and not none, so such a template writes an answer without its calls,
# and says nothing. Given the same message, the template itself writes the call.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6
cat > "$folder/look.py" <<'PYTHON'
import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and m['content'] is none %}"
    "{% for c in m['tool_calls'] %}CALL {{ c['function']['name'] }}{% endfor %}"
    "{% else %}{{ m['role'] }}: {{ m['content'] }};{% endif %}{% endfor %}"
)
MESSAGES = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]},
]
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
tokenizer.chat_template = TEMPLATE
written = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
by_jinja = jinja2.Template(TEMPLATE).render(messages=MESSAGES)
print(f"transformers {transformers.__version__}")
print(f"apply_chat_template: {written!r}")
print(f"jinja2 itself:       {by_jinja!r}")
assert by_jinja == "user: Rome?;CALL weather"
assert written == "user: Rome?;assistant: ;", "the behaviour has changed"
PYTHON
"$folder/venv/bin/python" "$folder/look.py"
