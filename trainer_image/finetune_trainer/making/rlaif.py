"""Stage rlaif: the model answers every prompt several times, a judge compares the answers, the decided pairs are the
output (arXiv:2212.08073, arXiv:2309.00267).

A step is a comparison. Answers are drawn batch by batch; a batch holds the same prompts and has a seed of its own
whatever happens to the run and whoever makes it, so a run that was killed ends with the same rows. Called by
``making/__init__.py``.
"""

import gc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations

from finetune_api.causes import Cause
from finetune_trainer.data.records import Message
from finetune_trainer.feed import draw_seed
from finetune_trainer.making import Made, Making, model_digest, page, prompts
from finetune_trainer.making.judges import Comparison, Judgement, Judging, opening
from finetune_trainer.making.ledger import key_of
from finetune_trainer.making.work import Work
from finetune_trainer.outcome import RunError

IN_VAIN = 20
"""Comparisons without a single verdict after which the judge is given up."""

Answers = list[list[tuple[str, bool]]]
"""By prompt of a batch: text, and whether it came to its own end."""


@dataclass(frozen=True)
class Pair:
    """Which two answers to which prompt."""

    prompt: int
    first: int
    second: int


@dataclass
class Judged:
    """What became of pairs, by pair."""

    pairs: dict[Pair, Judgement]
    passed_over: dict[Pair, str]
    """same (answers) or empty (one of them)."""

    def counts(self) -> Counter[str]:
        """How many came to what."""
        return Counter([*(judgement.outcome for judgement in self.pairs.values()), *self.passed_over.values()])

    def figures(self, judge: Judging | None = None) -> dict[str, float]:
        """agreement: share of the readable comparisons whose verdicts say the same both ways; tie_share: of those that
        decide nothing; first_place_share: of the verdicts for one answer those for the one in first place (0.5: the
        order does not count)."""
        counts = self.counts()
        read = counts["decided"] + counts["tie"] + counts["split"]
        named = [v for judgement in self.pairs.values() for v in judgement.verdicts if v in ("A", "B")]
        found = {
            "comparisons": float(sum(counts.values())),
            "decided": float(counts["decided"]),
            "agreement": (counts["decided"] + counts["tie"]) / read if read else 0.0,
            "tie_share": (counts["tie"] + counts["split"]) / read if read else 0.0,
            "first_place_share": named.count("A") / len(named) if named else 0.0,
            "judge_tokens": float(sum(judgement.tokens for judgement in self.pairs.values())),
        }
        if judge is not None:
            found |= {"requests": float(judge.tally.requests), "retries": float(judge.tally.retries)}
        return found


class Maker:
    """The stage in one process."""

    def __init__(self, making: Making) -> None:
        from finetune_trainer.making import writer
        from finetune_trainer.model import load_tokenizer

        config = making.config
        assert config.rlaif is not None
        self.making, self.config, self.options = making, config, config.rlaif
        making._phase("preparing", "reading the prompts")
        self.tokenizer = load_tokenizer(making.fetched.model, config)
        self.prompts, self.report = prompts.read(config, making.fetched, self.options.max_prompts)
        ids = [writer.rendered(self.tokenizer, prompt) for prompt in self.prompts]
        longest = config.data.max_length - self.options.max_new_tokens
        fitting = [number for number in range(len(ids)) if len(ids[number]) <= longest]
        self.too_long = len(ids) - len(fitting)
        if not fitting:
            raise RunError(
                Cause.INVALID_CONFIGURATION,
                f"no prompt leaves room for rlaif.max_new_tokens ({self.options.max_new_tokens}) in data.max_length "
                f"({config.data.max_length}): the shortest has {min(map(len, ids))} tokens. Raise data.max_length.",
            )
        self.ids = ids
        size = self.options.generation_batch_size
        self.batches = [fitting[first : first + size] for first in range(0, len(fitting), size)]
        self.pairs = list(combinations(range(self.options.num_generations), 2))
        self.steps = len(fitting) * len(self.pairs)
        self.judged = Judged({}, {})
        self.judge: Judging | None = None
        self.cut = self.written = 0

    # Answers

    def key(self, number: int) -> str:
        """Of a batch's answers."""
        return key_of(
            model=model_digest(self.config, self.making.fetched.digests),
            dtype=self.config.model.dtype,
            prompts=[self.ids[prompt] for prompt in self.batches[number]],
            seed=self.config.training.seed,
            batch=number,
            options=self.options.model_dump(mode="json", exclude={"judge", "max_prompts", "generation_batch_size"}),
        )

    def answers(self) -> Iterator[tuple[int, Answers]]:
        """This process's batches. The model is loaded only where one is not known yet, and is gone at the end."""
        from finetune_trainer.making.writer import Writer

        making, options, model = self.making, self.options, None
        for number in range(making.world.rank, len(self.batches), making.world.size):
            known = making.ledger.get(self.key(number))
            if known is None:
                if model is None:
                    making._print(f"loading {self.config.model.uri}")
                    model = Writer(
                        making.fetched.model, self.config, making.world.device, self.tokenizer, making.stop.beat
                    )
                known = model.write(
                    [self.ids[prompt] for prompt in self.batches[number]],
                    options.num_generations,
                    draw_seed(self.config.training.seed, number),
                    max_new_tokens=options.max_new_tokens,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    top_k=options.top_k,
                )
                making.ledger.put(self.key(number), known)
            yield number, known
        del model
        gc.collect()
        if making.world.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()

    # Verdicts

    def run(self) -> None:
        """Answers and verdicts of this process's prompts."""
        making = self.making
        open_judge, heavy = opening(self.config, making.fetched, making.ledger, making.world)
        making.begin(self.steps, "generating", f"answering {len(self.prompts)} prompts for {self.steps} comparisons")
        later: list[tuple[Pair, Comparison]] = []
        work: Work[tuple[Pair, Comparison], Judgement] | None = None
        if not heavy:
            work = self._work(open_judge)
        for number, answers in self.answers():
            for pair, comparison in self._compared(number, answers):
                if work is None:
                    later.append((pair, comparison))
                else:
                    work.add((pair, comparison))
            making.went_on(0, self.figures)
            if work is not None:
                self._collect(work, all_of_it=False)
        making._phase("judging", "judging")
        if work is None:
            work = self._work(open_judge)
            for task in later:
                work.add(task)
        self._collect(work, all_of_it=True)
        work.close()

    def _work(self, open_judge: Callable[[], Judging]) -> Work[tuple[Pair, Comparison], Judgement]:
        self.judge = judge = open_judge()
        work = Work[tuple[Pair, Comparison], Judgement](
            lambda task: judge.compare(task[1]), judge.threads, self.making.stop
        )
        self.making.work_in_hand = work
        return work

    def figures(self) -> dict[str, float]:
        """So far, of this process."""
        return self.judged.figures(self.judge)

    def _compared(self, number: int, answers: Answers) -> Iterator[tuple[Pair, Comparison]]:
        """The comparisons of a batch that need a judge; the others are noted."""
        for prompt, given in zip(self.batches[number], answers, strict=True):
            self.written += len(given)
            self.cut += sum(not ended for _, ended in given)
            for first, second in self.pairs:
                pair = Pair(prompt, first, second)
                texts = (given[first][0], given[second][0])
                if all(texts) and texts[0] != texts[1]:
                    yield pair, Comparison(self.prompts[prompt], texts)
                else:
                    self.judged.passed_over[pair] = "same" if all(texts) else "empty"
                    self.making.went_on(1, self.figures, known=True)

    def _collect(self, work: Work[tuple[Pair, Comparison], Judgement], *, all_of_it: bool) -> None:
        for (pair, _), judgement in work.done(all_of_it=all_of_it):
            self.judged.pairs[pair] = judgement
            self.making.went_on(1, self.figures, known=not judgement.asked)
            judged = self.judged.pairs
            if len(judged) == IN_VAIN and not any(
                one.outcome in ("decided", "tie", "split") for one in judged.values()
            ):
                raise self._in_vain()

    def _in_vain(self) -> RunError:
        """No verdict at all."""
        bad = [one for one in self.judged.pairs.values() if one.outcome in ("unreadable", "refused")]
        said = next((one.refused or " ".join((one.words[0] or one.words[1]).split())[:200] for one in bad), "")
        return RunError(
            Cause.INVALID_CONFIGURATION,
            f"the judge gave no verdict in {len(bad)} comparisons; it said: {said!r}. Accepted: exactly one of [[A]], "
            "[[B]], [[C]] in every answer. Choose a stronger judge, raise rlaif.judge.max_tokens, or correct "
            "rlaif.judge.prompt.",
        )

    # The output

    def gathered(self) -> dict[int, Answers]:
        """On the first process: the answers of all, by batch, and what all have judged. Collective."""
        making = self.making
        if making.world.size > 1:
            mine = {
                "pairs": [[*asdict(pair).values(), asdict(judgement)] for pair, judgement in self.judged.pairs.items()],
                "passed_over": [[*asdict(pair).values(), why] for pair, why in self.judged.passed_over.items()],
                "cut": self.cut,
                "written": self.written,
            }
            making.ledger.put(self._share(making.world.rank), mine)
        making.all_there()
        if not making.world.first:
            return {}
        for rank in range(1, making.world.size):
            theirs = making.ledger.get(self._share(rank))
            for *place, found in theirs["pairs"]:
                found = {**found, "verdicts": tuple(found["verdicts"]), "words": tuple(found["words"])}
                self.judged.pairs[Pair(*place)] = Judgement(**found)
            self.judged.passed_over |= {Pair(*place): why for *place, why in theirs["passed_over"]}
            self.cut += theirs["cut"]
            self.written += theirs["written"]
        return {number: making.ledger.get(self.key(number)) for number in range(len(self.batches))}

    def _share(self, rank: int) -> str:
        return f"share-{self.making.claim}-{rank}"

    def made(self, answers: dict[int, Answers]) -> Made:
        """Rows, in the order of the prompts. RunError(INVALID_DATA) where no comparison was decided."""
        counts = self.judged.counts()
        if not counts["decided"]:
            if self.judged.pairs and counts["unreadable"] + counts["refused"] == len(self.judged.pairs):
                raise self._in_vain()
            told = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            raise RunError(
                Cause.INVALID_DATA,
                f"no comparison was decided, so there is nothing to learn from ({told}; split: the judge named the "
                "answer in the same place both times). Choose a stronger judge, more prompts, or a higher "
                "rlaif.temperature.",
            )
        texts: dict[int, list[str]] = {}
        for number, given in answers.items():
            for prompt, said in zip(self.batches[number], given, strict=True):
                texts[prompt] = [text for text, _ in said]
        rows, looked_at = [], []
        for pair in sorted(self.judged.pairs, key=lambda pair: (pair.prompt, pair.first, pair.second)):
            judgement = self.judged.pairs[pair]
            both = (texts[pair.prompt][pair.first], texts[pair.prompt][pair.second])
            looked_at.append(
                {"prompt": self.prompts[pair.prompt], "answers": list(both), "outcome": judgement.outcome}
                | {"verdicts": list(judgement.verdicts), "words": list(judgement.words)}
                | ({"refused": judgement.refused} if judgement.refused else {})
            )
            if judgement.better is not None:
                chosen, rejected = both[judgement.better], both[1 - judgement.better]
                rows.append({"prompt": self.prompts[pair.prompt], "chosen": _said(chosen), "rejected": _said(rejected)})
        figures = self.figures()
        return Made(
            rows=rows,
            figures=figures,
            tiles=[
                ("Rows", f"{len(rows):,}"),
                ("Agreement", f"{figures['agreement']:.1%}"),
                ("Ties", f"{figures['tie_share']:.1%}"),
                ("First place", f"{figures['first_place_share']:.1%}"),
            ],
            sections=[
                ("What the comparisons came to", page.outcomes(counts)),
                ("Answers", page.written(self.written, self.cut, self.too_long, self.options.max_new_tokens)),
                ("Examples", page.examples(looked_at)),
                ("Prompts", page.sources(self.report)),
            ],
            beside={"comparisons.jsonl": looked_at},
        )


def _said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def make(making: Making) -> Made | None:
    """The whole stage."""
    maker = Maker(making)
    maker.run()
    answers = maker.gathered()
    return maker.made(answers) if making.world.first else None
