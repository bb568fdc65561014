"""Preferences by a judge: whole runs against a real HTTP server on loopback, and with a judge that is loaded."""

import itertools
import json
import os
import signal
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finetune_api.causes import Cause
from finetune_api.run import ENV_ATTEMPT, ENV_WORK, EXIT_STOPPED, TrainerConfig
from finetune_trainer.data.formats import TABLE
from finetune_trainer.data.recognise import recognise
from finetune_trainer.data.records import Preference
from finetune_trainer.making import Making
from finetune_trainer.making.judges import Judgement, question, verdict
from finetune_trainer.making.ledger import FOLDER, Ledger
from finetune_trainer.outcome import RunError
from finetune_trainer.stopping import Stop
from finetune_trainer.storage import Store
from finetune_trainer.telemetry import Telemetry
from tests.trainer import tiny
from tests.trainer.judge_server import answers, first_place, longer, serving

PROMPTS = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rlaif")
    tiny.make_model(root / "model")
    tiny.make_rows(root / "train.jsonl", PROMPTS)
    return root


def config(made: Path, root: Path, url: str = "", judge: dict[str, Any] | None = None, **options: Any) -> TrainerConfig:
    asked = judge or {"endpoint": url, "model": "judge-1", "max_concurrency": 3, "timeout": "20s"}
    rlaif = {"judge": asked, "max_new_tokens": 8, "generation_batch_size": 4, **options}
    plain = tiny.make_config(made, stage="rlaif", rlaif=rlaif, method={"type": "lora"}).model_dump(mode="json")
    places = {"checkpoint_uri": f"file://{root}/checkpoints", "output_uri": f"file://{root}/output"}
    return TrainerConfig.model_validate(plain | places)


def run(config: TrainerConfig, root: Path, attempt: int = 1) -> Making:
    os.environ[ENV_ATTEMPT], os.environ[ENV_WORK] = str(attempt), str(root / f"work-{attempt}")
    making = Making(config, Telemetry(config, serve=False), Stop())
    try:
        assert making.run() == 0
    finally:
        if hasattr(making, "pulse"):
            making.pulse.close()
    return making


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_judge_that_can_tell_gives_the_right_preferences(made: Path, tmp_path: Path) -> None:
    with serving(longer) as judge:
        os.environ["OPENAI_API_KEY"] = "secret"
        try:
            making = run(config(made, tmp_path, judge.url, num_generations=3), tmp_path)
        finally:
            del os.environ["OPENAI_API_KEY"]
    rows = lines(tmp_path / "output" / "preferences.jsonl")
    compared = lines(tmp_path / "output" / "comparisons.jsonl")
    assert making.step == making.max_steps == PROMPTS * 3
    assert 0 < len(rows) == sum(one["outcome"] == "decided" for one in compared) == len(compared)
    for row in rows:
        better, worse = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert (len(better), better) > (len(worse), worse)
    assert set(judge.keys) == {"Bearer secret"}
    assert len(judge.bodies) == 2 * len(compared) == len({json.dumps(body) for body in judge.bodies})
    asked = Counter(frozenset(answers(body)) for body in judge.bodies)
    assert all(count % 2 == 0 for count in asked.values())  # once in each order
    figures = making.tally.evaluation
    assert (figures["agreement"], figures["tie_share"], figures["first_place_share"]) == (1.0, 0.0, 0.5)
    assert figures["judge_tokens"] == 7 * len(judge.bodies) == 7 * figures["requests"]
    # What other stages take.
    assert recognise(rows, Preference) == "preference"
    assert all(isinstance(record, Preference) for row in rows for record in TABLE["preference"].convert(row))
    progress = making.telemetry.progress()
    assert (progress.step, progress.max_steps, progress.phase) == (18, 18, "done")
    [output] = making.outputs
    assert (output.kind, output.uri) == ("data", f"file://{tmp_path}/output/preferences.jsonl")
    page = (tmp_path / "output" / "report.html").read_text()
    assert "What the comparisons came to" in page and "Answer A says more." in page
    assert json.loads((tmp_path / "output" / "manifest.json").read_text())["rows"] == len(rows)


def test_a_judge_that_likes_a_place_decides_nothing(made: Path, tmp_path: Path) -> None:
    with serving(first_place) as judge, pytest.raises(RunError) as refused:
        run(config(made, tmp_path, judge.url), tmp_path)
    assert refused.value.cause is Cause.INVALID_DATA
    assert "5 split" in refused.value.message and "in the same place both times" in refused.value.message


def test_a_judge_that_likes_a_place_now_and_then_loses_those_pairs_only(made: Path, tmp_path: Path) -> None:
    def sometimes(judge: Any, body: dict[str, Any]) -> Any:
        return first_place(judge, body) if min(answers(body)) < "cat" else longer(judge, body)

    with serving(sometimes) as judge:
        making = run(config(made, tmp_path, judge.url, num_generations=4), tmp_path)
    outcomes = Counter(one["outcome"] for one in lines(tmp_path / "output" / "comparisons.jsonl"))
    assert outcomes["split"] and outcomes["decided"] and set(outcomes) == {"split", "decided"}
    whole = outcomes["split"] + outcomes["decided"]
    assert making.tally.evaluation["tie_share"] == pytest.approx(outcomes["split"] / whole)
    assert making.tally.evaluation["first_place_share"] > 0.5


def test_failures_pass_and_rate_limits_are_kept(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question fails first: by 429 with Retry-After, by 500 twice, or by a verdict that says two things."""
    seen: Counter[str] = Counter()
    pauses: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", pauses.append)

    def unwilling(judge: Any, body: dict[str, Any]) -> Any:
        question = body["messages"][0]["content"]
        with judge.lock:
            seen[question] += 1
            time, kind = seen[question], list(seen).index(question) % 3
        if time < (3 if kind == 1 else 2):
            return [(429, {"Retry-After": "7"}, {}), (500, {}, {}), (200, {}, "[[A]] or [[B]]?")][kind]
        return longer(judge, body)

    with serving(unwilling) as judge:
        making = run(config(made, tmp_path, judge.url), tmp_path)
    assert 7.0 in pauses and any(0 < pause < 7 for pause in pauses)
    assert making.tally.evaluation["agreement"] == 1.0
    assert making.tally.evaluation["retries"] >= len(pauses)
    reminded = [body for body in judge.bodies if len(body["messages"]) == 3]
    assert reminded and reminded[0]["messages"][1]["content"] == "[[A]] or [[B]]?"


@pytest.mark.parametrize(
    ("rule", "cause", "told"),
    [
        (lambda judge, body: (401, {}, {"error": {"message": "bad key"}}), Cause.ACCESS_DENIED, "OPENAI_API_KEY"),
        (lambda judge, body: (404, {}, {"error": "no model"}), Cause.INVALID_CONFIGURATION, "rlaif.judge.model"),
        (lambda judge, body: (200, {}, {"answer": 1}), Cause.INVALID_CONFIGURATION, "chat completions"),
        (lambda judge, body: (503, {}, {}), Cause.ENDPOINT_UNAVAILABLE, "503 to every try"),
        (lambda judge, body: (400, {}, {"error": {"message": "too long"}}), Cause.INVALID_CONFIGURATION, "too long"),
        (lambda judge, body: (200, {}, "I like both."), Cause.INVALID_CONFIGURATION, "I like both."),
    ],
)
def test_what_does_not_pass_is_told(made: Path, tmp_path: Path, rule: Any, cause: Cause, told: str) -> None:
    with serving(rule) as judge, pytest.raises(RunError) as refused:
        asked = {"endpoint": judge.url, "model": "judge-1", "max_retries": 0}
        run(config(made, tmp_path, judge=asked), tmp_path)
    assert refused.value.cause is cause
    assert told in refused.value.message


def test_nobody_at_the_endpoint(made: Path, tmp_path: Path) -> None:
    with serving(longer) as judge:
        gone = judge.url
    with pytest.raises(RunError) as refused:
        run(config(made, tmp_path, judge={"endpoint": gone, "model": "j", "max_retries": 0}), tmp_path)
    assert refused.value.cause is Cause.ENDPOINT_UNAVAILABLE
    assert gone in refused.value.message


def test_a_run_killed_and_stopped_ends_with_the_same_rows_and_asks_nothing_twice(made: Path, tmp_path: Path) -> None:
    """kill -9 of one attempt, SIGTERM of the next, then to the end; beside it, a run left alone."""
    with serving(longer) as judge:
        run(config(made, tmp_path / "alone", judge.url, num_generations=3), tmp_path / "alone")
    whole = len(judge.answered)
    disturbed = tmp_path / "disturbed"
    disturbed.mkdir()
    with serving(longer) as judge:
        wanted = config(made, disturbed, judge.url, num_generations=3)
        for attempt, (number, wanted_code) in enumerate([(signal.SIGKILL, -9), (signal.SIGTERM, EXIT_STOPPED)], 1):
            (disturbed / "termination").unlink(missing_ok=True)
            process = tiny.start(tiny.environment(disturbed, wanted, attempt), module="launch")
            limit, arrived = len(judge.bodies) + whole // 3, threading.Event()

            def hold(
                count: int, process: Any = process, limit: int = limit, number: int = number, arrived: Any = arrived
            ) -> None:
                """From some request on none is answered, and the signal comes; when it has arrived, they are."""
                if count >= limit:
                    if count == limit:
                        process.send_signal(number)
                    arrived.wait()

            judge.at = hold
            output = ""
            for line in process.stdout or ():
                output += line
                if "SIGTERM: stopping" in line:
                    arrived.set()
            arrived.set()
            assert process.wait() == wanted_code, output
            assert 0 < len(judge.answered) < whole
        assert "every answer is kept" in tiny.word(disturbed).message
        stopped = tiny.word(disturbed)
        assert stopped.last_checkpoint is not None and stopped.last_checkpoint.uri.endswith(FOLDER)
        judge.at = lambda count: None
        making = run(wanted, disturbed, attempt=3)
    assert making.telemetry.progress().resumed_from_step
    for name in ("preferences.jsonl", "comparisons.jsonl"):
        assert (disturbed / "output" / name).read_bytes() == (tmp_path / "alone" / "output" / name).read_bytes()
    # What was answered while the process was killed never came to it: at most what was on its way.
    twice = [body for body, count in Counter(judge.answered).items() if count > 1]
    assert wanted.rlaif is not None
    assert len(twice) <= wanted.rlaif.judge.max_concurrency
    assert len(set(judge.answered)) == whole
    [first, *others] = [claim.get("cause") for claim in making.fence.attempts()]
    assert first is None and others[:1] == ["Terminated"]


def test_a_judge_that_is_loaded_gives_the_verdict_it_holds_most_probable(made: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    marks = ("[[A]]", "[[B]]", "[[C]]")
    folder = tiny.make_model(tmp_path / "judge", seed=5, words=marks)
    ask = "{prompt} one {answer_a} two {answer_b} three [[A]]"
    making = run(config(made, tmp_path, judge={"uri": f"file://{folder}", "prompt": ask}, num_generations=4), tmp_path)
    compared = lines(tmp_path / "output" / "comparisons.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    places = tokenizer.convert_tokens_to_ids(list(marks))
    for one in compared[:6]:
        for order, said in zip((one["answers"], one["answers"][::-1]), one["verdicts"], strict=True):
            text = ask.replace("{prompt}", one["prompt"][0]["content"])
            text = text.replace("{answer_a}", order[0]).replace("{answer_b}", order[1])
            ids = tokenizer(
                f"<user> {text} <end> <assistant> ", return_tensors="pt", add_special_tokens=False
            ).input_ids
            scores = model(ids).logits[0, -1, places]
            assert "ABC"[int(torch.argmax(scores))] == said
    assert making.tally.evaluation["requests"] == 2 * len(compared)
    again = run(
        config(made, tmp_path, judge={"uri": f"file://{folder}", "prompt": ask}, num_generations=4), tmp_path, 2
    )
    assert again.tally.evaluation["requests"] == 0


def test_two_processes_make_the_rows_of_one(made: Path, tmp_path: Path) -> None:
    with serving(longer) as judge:
        run(config(made, tmp_path / "one", judge.url), tmp_path / "one")
        two = tmp_path / "two"
        two.mkdir()
        wanted = config(made, two, judge.url)
        process = tiny.start(tiny.environment(two, wanted), 2)
        output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    for name in ("preferences.jsonl", "comparisons.jsonl"):
        assert (two / "output" / name).read_bytes() == (tmp_path / "one" / "output" / name).read_bytes()
    word = tiny.word(two)
    assert (word.step, word.max_steps, word.outputs[0].kind) == (PROMPTS, PROMPTS, "data")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Good. [[A]]", "A"),
        ("[[B]]", "B"),
        ("[[C]] because … so [[C]]", "C"),
        ("[[A]] and [[B]]", ""),
        ("A", ""),
        ("[A]", ""),
        ("[[a]]", ""),
        ("[[D]]", ""),
        ("", ""),
    ],
)
def test_a_verdict_is_one_mark_or_none(text: str, found: str) -> None:
    assert verdict(text) == found


def test_only_verdicts_that_name_the_same_answer_decide() -> None:
    decided = {(a, b): Judgement((a, b), ("", "")).better for a, b in itertools.product("ABC", repeat=2)}
    assert {pair: better for pair, better in decided.items() if better is not None} == {("A", "B"): 0, ("B", "A"): 1}
    assert Judgement(("C", "C"), ("", "")).outcome == "tie"
    assert Judgement(("A", "C"), ("", "")).outcome == "split"
    assert Judgement(("A", ""), ("", "")).outcome == "unreadable"


def test_a_question_is_filled_once() -> None:
    from finetune_api.stages import Judge

    judge = Judge(endpoint="http://x", model="y")
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "{answer_b}?"}]
    text = question(judge, prompt, "{prompt}", "second")
    assert "System: S\n\nUser: {answer_b}?" in text
    assert "<answer_a>\n{prompt}\n</answer_a>" in text
    assert text.count("second") == 1 and "helpful, honest and harmless" in text


def test_a_ledger_outlives_its_process_and_folds_its_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.making.ledger.FOLDED", 5)
    store = Store(f"file://{tmp_path}")
    ledger = Ledger(store, "000001-0")
    threads = [threading.Thread(target=ledger.put, args=(f"key-{n}", {"n": n})) for n in range(23)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = [entry.path for entry in store.list(FOLDER)]
    assert sorted(Path(path).suffix for path in paths) == [".json"] * 3 + [".jsonl"] * 4
    (tmp_path / FOLDER / "000001-0-000099").mkdir()
    (tmp_path / FOLDER / "000001-0-000099" / "bad.json").write_text('{"key": "bad"')
    other = Ledger(store, "000002-0")
    assert other.load() == 23
    assert [other.get(f"key-{n}") for n in range(23)] == [{"n": n} for n in range(23)]
    assert other.get("bad") is None and "bad" not in other
