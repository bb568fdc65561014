"""``finetune chat``: a conversation with a finished model, in a terminal or by lines of standard input.

``python -m finetune_trainer.chat CONFIG``, a process of its own that reads a ``ChatConfig``. Answers come word by word.
With ``compare`` the model without its adapter answers beside it, each in a conversation of its own.
"""

import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TextStreamer

from finetune_api.causes import Cause
from finetune_api.run import ChatConfig
from finetune_api.spec import Training
from finetune_trainer.command import carried_out
from finetune_trainer.data.records import Message
from finetune_trainer.finished import find, load, precision
from finetune_trainer.generate import end_tokens
from finetune_trainer.outcome import RunError

HELP = (
    "/reset begins anew, /system TEXT does so with another system prompt, /exit or Ctrl-D ends; Ctrl-C stops an answer."
)
GAP = 3  # columns between two answers side by side


@dataclass
class Talk:
    """One conversation with one model."""

    model: Any
    tokenizer: Any
    config: ChatConfig
    under: Callable[[], AbstractContextManager[Any]] = nullcontext
    """What the model answers under: with its adapter, or with it switched off."""
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    """Messages that the model no longer sees, because they would not fit."""

    def begin(self, system: str) -> None:
        """Anew."""
        self.messages = [{"role": "system", "content": system}] if system else []
        self.forgotten = 0

    def answer(self, text: str, write: Callable[[str], None]) -> str:
        """The answer to what the user says now; ``write`` gets its pieces as they come."""
        self.messages.append({"role": "user", "content": text})
        ids = self._prompt()
        streamer = _Pieces(self.tokenizer, write)
        options = self._sampling()
        with self.under(), precision(self.model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            try:
                self.model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    streamer=streamer,
                    max_new_tokens=self.config.max_new_tokens,
                    pad_token_id=self.tokenizer.pad_token_id,
                    eos_token_id=end_tokens(self.model, self.tokenizer) or None,
                    use_cache=True,
                    **options,
                )
            except KeyboardInterrupt:
                streamer.end()
        said = streamer.text.strip()
        self.messages.append({"role": "assistant", "content": said})
        return said

    def _prompt(self) -> torch.Tensor:
        """The conversation as far as it fits, (1, T); the oldest exchanges are left out first."""
        limit = int(getattr(self.model.config, "max_position_embeddings", 0) or 1 << 30)
        while True:
            text = self.tokenizer.apply_chat_template(self.messages, tokenize=False, add_generation_prompt=True)
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            first = 1 if self.messages[0]["role"] == "system" else 0
            if ids.shape[1] + self.config.max_new_tokens <= limit or len(self.messages) - first < 3:
                return ids.to(self.model.device)
            del self.messages[first : first + 2]
            self.forgotten += 2

    def _sampling(self) -> dict[str, Any]:
        config = self.config
        plain: dict[str, Any] = {"repetition_penalty": config.repetition_penalty}
        if config.temperature == 0:
            return plain | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return plain | {
            "do_sample": True,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "top_k": config.top_k,
        }


class _Pieces(TextStreamer):
    """Text as it becomes certain: words, and characters of scripts without spaces."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.write = write
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """A piece."""
        self.text += text
        self.write(text)


def turns(source: TextIO, terminal: bool) -> Iterator[str]:
    """What the user says: lines that are not empty."""
    if terminal:
        import readline  # noqa: F401  (editing and history in input())
    while True:
        try:
            line = input("> ") if terminal else source.readline()
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
            continue
        if not terminal and not line:
            return
        if line.strip():
            yield line.strip()


def side_by_side(left: tuple[str, str], right: tuple[str, str], width: int) -> str:
    """Two texts with their titles, in two columns that are ``width`` wide together."""
    column = max(20, (width - GAP) // 2)
    columns = []
    for title, text in (left, right):
        lines = [title, "-" * min(column, len(title))]
        for paragraph in text.splitlines() or ["(nothing)"]:
            lines += textwrap.wrap(paragraph, column, break_long_words=True) or [""]
        columns.append(lines)
    height = max(len(lines) for lines in columns)
    first, second = (lines + [""] * (height - len(lines)) for lines in columns)
    return "\n".join(f"{a.ljust(column)}{' ' * GAP}{b}".rstrip() for a, b in zip(first, second, strict=True))


def converse(talks: dict[str, Talk], system: str, source: TextIO, out: TextIO, terminal: bool) -> None:
    """Until the user ends it. ``talks``: by name; two are shown side by side."""

    def write(text: str) -> None:
        out.write(text)
        out.flush()

    for talk in talks.values():
        talk.begin(system)
    for text in turns(source, terminal):
        word, _, rest = text.partition(" ")
        if word in ("/exit", "/quit"):
            return
        if word in ("/reset", "/system"):
            system = rest.strip() if word == "/system" else system
            for talk in talks.values():
                talk.begin(system)
        elif word == "/help":
            write(HELP + "\n")
        elif len(talks) == 1:
            [talk] = talks.values()
            talk.answer(text, write)
            write("\n")
        else:
            said = [(name, talk.answer(text, lambda piece: None)) for name, talk in talks.items()]
            if terminal:
                write(side_by_side(said[0], said[1], shutil.get_terminal_size().columns) + "\n")
            else:
                write("".join(f"{name}: {answer}\n" for name, answer in said))
        for name, talk in talks.items():
            if talk.forgotten:
                print(f"({name}: the first {talk.forgotten} messages no longer fit and are left out)", file=sys.stderr)
                talk.forgotten = 0


def opened(config: ChatConfig, cache: Path) -> dict[str, Talk]:
    """The conversations: with the model, and with ``compare`` with its base before it. RunError."""
    from finetune_trainer import model
    from finetune_trainer.world import World

    found = find(config, cache, [], Training())
    if model.kind_of(found.config.stage) is not model.LANGUAGE_MODEL:
        raise RunError(
            Cause.INVALID_CONFIGURATION,
            f"{config.model.uri} was trained by stage {found.config.stage} and holds no conversation. Accepted: a "
            "causal language model; of others finetune evaluate tells the figures.",
        )
    device = torch.device("cuda" if found.config.accelerator == "gpu" else "cpu")
    tokenizer = model.load_tokenizer(found.words, found.config)
    tuned, off = load(found, World(0, 0, 1, device, None))
    talks = {"tuned": Talk(tuned, tokenizer, config)}
    if not config.compare:
        return talks
    if off is None:
        if config.base is None:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"{config.model.uri} is a whole model: what to compare it with is not known. Name that model by "
                "--base, or the adapter in place of the whole model.",
            )
        other = config.model_copy(update={"model": config.base, "base": None})
        below = find(other, cache, [], Training())
        base, _ = load(below, World(0, 0, 1, device, None))
        return {"base": Talk(base, model.load_tokenizer(below.words, below.config), config), **talks}
    return {"base": Talk(tuned, tokenizer, config, off), **talks}


def main(arguments: list[str]) -> int:
    """The command; its exit code."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def work(cache: Path) -> None:
        config = ChatConfig.model_validate_json(Path(arguments[0]).read_bytes())
        talks = opened(config, cache)
        if config.seed is not None:
            torch.manual_seed(config.seed)
        if terminal:
            print(f"{config.model.uri}. {HELP}")
        converse(talks, config.system, sys.stdin, sys.stdout, terminal)

    try:
        return carried_out("answering", work)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
