"""What an attempt wrote is told again, out of its checkpoint folder."""

import subprocess
import sys

import pytest

pytest.importorskip("obstore", reason="needs the trainer extra")

from finetune_api.causes import Cause
from finetune_api.run import (
    ENV_ATTEMPT,
    ENV_CONFIG,
    ENV_TERMINATION_LOG,
    EXIT_FAILED,
    EXIT_USER,
    OutputInfo,
    Termination,
)
from finetune_api.spec import FineTuneJobSpec
from finetune_operator import manifests
from finetune_operator.cluster.gpus import Gpus
from finetune_operator.cluster.local import LocalCluster
from finetune_operator.plan import Owner, make_plan
from finetune_operator.reconcile import reconcile
from finetune_operator.settings import Profile, Settings
from finetune_trainer import recall
from finetune_trainer.fence import claim, last_word
from finetune_trainer.storage import Store
from tests import PATIENCE
from tests.trainer.test_storage import flat_s3, flat_s3_server, no_credentials, s3, s3_server, store
from tests.trainer.tiny import make_config

__all__ = ["flat_s3", "flat_s3_server", "no_credentials", "s3", "s3_server", "store"]  # fixtures

WORD = Termination(
    cause=Cause.SUCCEEDED,
    step=7,
    outputs=[OutputInfo(uri="s3://team/out", kind="adapter", digest="sha256:1", size=7)],
    message="Trained 7 steps.",
    loss=float("nan"),
)


@pytest.fixture
def told(store, tmp_path, monkeypatch):
    """Runs the container for an attempt: (exit code, its last word)."""
    config = make_config(tmp_path, checkpoint_uri=store.uri())
    (tmp_path / "config.json").write_text(config.model_dump_json())
    monkeypatch.setenv(ENV_CONFIG, str(tmp_path / "config.json"))
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "termination"))

    def told(attempt: int) -> tuple[int, Termination]:
        monkeypatch.setenv(ENV_ATTEMPT, str(attempt))
        (tmp_path / "termination").unlink(missing_ok=True)
        return recall.main(), Termination.model_validate_json((tmp_path / "termination").read_bytes())

    return told


def test_the_word_of_the_attempt_that_is_asked_for_is_told(store, told):
    for attempt in (1, 2, 3):
        fence = claim(store, attempt=attempt)
        if attempt != 3:
            fence.end(WORD.model_copy(update={"step": attempt}), "2026-01-01T00:00:00Z")
    code, word = told(2)
    assert (code, word.cause, word.step, word.outputs) == (0, Cause.SUCCEEDED, 2, WORD.outputs)
    code, word = told(3)
    assert (code, word.cause) == (EXIT_USER, Cause.DATA_NOT_FOUND)
    assert word.message.startswith(f"{store.uri('attempts')}/ does not tell what attempt 3 wrote")


def test_a_word_of_an_older_trainer_tells_no_outputs_and_is_none(store, told):
    claim(store, attempt=1).note("ended", {"cause": "Succeeded", "message": "Trained.", "step": 7, "ended": "x"})
    assert told(1)[1].cause is Cause.DATA_NOT_FOUND


def test_the_attempt_of_a_job_that_was_made_anew_is_another_one(tmp_path):
    folder = Store(tmp_path.as_uri())
    claim(folder, attempt=1, run="one").end(WORD, "2026-01-01T00:00:00Z")
    assert last_word(folder, 1, "one").outputs == WORD.outputs
    assert last_word(folder, 1, "two") is None


def test_storage_that_does_not_answer_is_no_missing_word(tmp_path, monkeypatch, no_credentials):
    monkeypatch.setattr("finetune_trainer.recall.Store", lambda uri: Store(uri, patience=0.5))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    (tmp_path / "config.json").write_text(make_config(tmp_path, checkpoint_uri="s3://team/x").model_dump_json())
    monkeypatch.setenv(ENV_CONFIG, str(tmp_path / "config.json"))
    monkeypatch.setenv(ENV_TERMINATION_LOG, str(tmp_path / "termination"))
    monkeypatch.setenv(ENV_ATTEMPT, "1")
    assert recall.main() == EXIT_FAILED
    assert Termination.model_validate_json((tmp_path / "termination").read_bytes()).cause is Cause.STORAGE_UNAVAILABLE


def test_it_is_light():
    code = "import sys, finetune_trainer.recall; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_on_this_machine_a_result_is_read_where_its_pods_are_gone(tmp_path):
    spec = {
        "model": {"uri": f"file://{tmp_path}/model"},
        "data": {"train": [{"uri": f"file://{tmp_path}/rows.jsonl"}]},
        "output": {"uri": f"file://{tmp_path}/out"},
        "workers": {"gpusPerWorker": 0},
    }
    cluster = LocalCluster(tmp_path / "state", gpus=Gpus((), tmp_path / "gpus"), cache=tmp_path / "cache")
    cluster.claim("default", "tune")
    metadata = {"namespace": "default", "name": "tune"}
    api = {"apiVersion": manifests.API_VERSION, "kind": manifests.KIND}
    job = cluster.submit({**api, "metadata": metadata, "spec": spec})
    settings = Settings(profiles={"default": Profile()})
    owner = Owner("default", "tune", job["metadata"]["uid"], {})
    plan = make_plan(owner, FineTuneJobSpec.model_validate(spec), settings.profiles["default"], {})
    gang = manifests.job(plan, 1)
    gang["metadata"] |= {"uid": "gang", "creationTimestamp": "2026-01-01T00:00:00Z"}
    gang["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    for made in (manifests.config_map(plan), gang):
        cluster.folder("default", "tune").put(made)
    claim(Store(plan.config.checkpoint_uri), attempt=1).end(WORD, "2026-01-01T00:00:00Z")
    states = []
    try:
        while "Succeeded" not in states:
            states.append(reconcile(cluster, settings, "default", "tune").job["status"]["state"])
            cluster.wait(PATIENCE if states[-1] == "Finishing" else 0)
    finally:
        cluster.close()
    assert states[0] == "Finishing"
    assert cluster.finetunejob("default", "tune")["status"]["outputs"][0]["digest"] == "sha256:1"
