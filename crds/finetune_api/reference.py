"""Generates ``docs/api.md`` from the models, the rules and the tables.

``python -m finetune_api.reference --write`` writes it, ``--check`` fails where the committed file is another one,
without either it is printed.
"""

import ast
import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from finetune_api import conditions
from finetune_api.causes import RETRY, Cause, Retry
from finetune_api.compatibility import COMPATIBILITY
from finetune_api.conditions import Condition, Reason, State
from finetune_api.crd import COLUMNS, SELECTABLE
from finetune_api.generated import command
from finetune_api.rules import IMMUTABLE, NAME_LENGTH, RULES
from finetune_api.schema import PATTERNS, PRESERVE, accepted, spec_schema, status_schema, text
from finetune_api.stages import STAGES

PATH = Path(__file__).resolve().parents[2] / "docs" / "api.md"

INTRODUCTION = f"""\
# FineTuneJob, finetune.dev/v1alpha1

<!-- Generated from crds/finetune_api by `make generate` (python -m finetune_api.reference --write). Do not edit. -->

`kubectl explain finetunejob.spec` says the same on a cluster. Kubernetes structure is in camelCase;
hyper-parameters keep the names they have in Hugging Face, TRL, PEFT and DeepSpeed. Whole numbers of integer fields have
no decimal point: kubectl makes `2` of `2.0`, but what a client sends as JSON stays as it is, and a rule on such a field
then fails in the API server with `invalid data, expected int, got float64`.

```yaml
apiVersion: finetune.dev/v1alpha1
kind: FineTuneJob
metadata:
  name: self-cognition # at most {NAME_LENGTH} lower-case letters, digits and -
spec:
  model: {{uri: hf://HuggingFaceTB/SmolLM2-135M-Instruct}}
  method: {{type: lora, r: 16, lora_alpha: 32}}
  data:
    train: [{{uri: s3://team/self_cognition.jsonl, format: alpaca}}]
  training: {{learning_rate: 1.0e-3, num_train_epochs: 10}}
  output: {{uri: s3://team/models/self-cognition}}
```
"""

STATES = {
    State.PENDING: "The operator has not looked at it yet, or makes its pods.",
    State.INVALID: "The spec has mistakes: the condition Accepted lists all of them.",
    State.WAITING: "The job of a job:// input has not succeeded yet.",
    State.QUEUED: "A queue (Kueue, say) holds its Job or its pods back.",
    State.STARTING: "Pods are being scheduled, or load model and data.",
    State.RUNNING: "Steps are being finished.",
    State.RESTARTING: "An attempt has failed; the next one continues from the newest checkpoint.",
    State.FINISHING: "The workers have finished, and no pod can tell what they wrote: it is read from the storage.",
    State.SUSPENDING: "A checkpoint is saved before the pods go.",
    State.SUSPENDED: "spec.suspend is true and no pod is left.",
    State.SUCCEEDED: "The output is written.",
    State.FAILED: "It has failed for good.",
}

CAUSES = {
    "Succeeded": "The run finished and its output is written.",
    "Suspended": "spec.suspend was set; a checkpoint was saved.",
    "InvalidConfiguration": "A setting that only the trainer can judge is wrong; the message says which.",
    "ModelNotFound": "There is no model, or no whole one, at spec.model.uri.",
    "DataNotFound": "There are no rows at one of the sources.",
    "InvalidData": "A row is not in the format the source names; the message gives file and line.",
    "AccessDenied": "Storage or hub refused the credentials.",
    "CheckpointMismatch": "The checkpoints found are those of another configuration.",
    "OutOfGPUMemory": "The model, its optimizer or a batch does not fit into GPU memory.",
    "NonFiniteLoss": "The loss became NaN or infinite.",
    "NoAccelerator": (
        "A worker found no GPU although gpusPerWorker asks for some; its node is left out of the next attempt. It is "
        "final when it happens again."
    ),
    "OutOfMemory": "A container used more memory than its limit.",
    "OutOfDisk": "The pod used more disk than its own limit (an emptyDir, ephemeral storage), or a disk is full.",
    "TrainerError": "The trainer raised an error it has no name for; the log's last lines are in status.",
    "Killed": "A signal ended the process, and nobody said why.",
    "Stalled": "No step was finished for recovery.hangTimeout.",
    "StartTimeout": "The first step was not finished within recovery.startTimeout.",
    "StorageUnavailable": "Storage or hub did not answer.",
    "ClockSkew": "The storage refuses requests because the clock of the pod's node is wrong.",
    "EndpointUnavailable": "The model behind an endpoint did not answer, or not often enough.",
    "CommunicationError": "Workers lost each other (NCCL or Gloo).",
    "GPUError": (
        "A GPU failed (CUDA or Xid error), or the node could not give a container its GPUs; the node is left out of "
        "the next attempt."
    ),
    "StartError": (
        "A node could not start a container; it is left out of the next attempt. It is final where another node "
        "cannot start it either."
    ),
    "ContainerError": "A container of your own (an init container or a sidecar) failed the pod.",
    "Unknown": "None of the others could be found.",
    "Evicted": "A pod was evicted: a drain, or a node short of memory or disk, which is left out of the next attempt.",
    "Preempted": "A pod made room for one of higher priority, or a queue took its room back.",
    "PodRejected": "A node's kubelet refused the pod (OutOfcpu, TopologyAffinityError …); the node is left out.",
    "NodeLost": "A node is gone or not ready; it is left out of the next attempt.",
    "NoOtherNode": "The pods fit on no node but those left out, which are allowed again.",
    "PartlyPlaced": "Only some of the pods had a node for recovery.pendingTimeout; the nodes were given back.",
    "Terminated": "A pod was deleted or told to stop.",
    "JobDeleted": "The attempt's Job was deleted by someone else.",
    "Fenced": "A newer attempt has taken over this one's storage.",
}

RETRIES = {
    Retry.NEVER: "no",
    Retry.COUNTED: "yes, counted against recovery.maxRestarts",
    Retry.FREE: "yes, not counted",
}


def rendered() -> str:
    """The page."""
    parts = [
        INTRODUCTION,
        *_spec(),
        *_rules(),
        *_steering(),
        *_stages(),
        *_compatibility(),
        *_status(),
        *_conditions(),
        *_causes(),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def _code(value: str) -> str:
    return f"`{value}`" if value else ""


# ---- fields ----


def _spec() -> Iterator[str]:
    yield from _object("spec", spec_schema())


def _object(path: str, node: dict[str, Any]) -> Iterator[str]:
    yield f"## {path}\n" if path.count(".") == 0 else f"### {path}\n"
    yield node["description"] + "\n"
    rows: list[tuple[str, ...]] = []
    below: list[tuple[str, dict[str, Any]]] = []
    for name, child in node["properties"].items():
        required = name in node.get("required", ())
        inner = child["items"] if child.get("type") == "array" else child
        if "properties" in inner:
            below.append((f"{path}.{name}" + ("[]" if inner is not child else ""), inner))
        row: tuple[str, ...] = (_code(name), _type(child), child["description"])
        if not path.startswith("status"):
            default = "**required**" if required else _default(child)
            range_ = "" if "properties" in inner and inner is child else _accepted(child)
            row = (*row[:2], default, range_, *row[2:])
        rows.append(row)
    head = ("Field", "Type", "Meaning") if len(rows[0]) == 3 else ("Field", "Type", "Default", "Accepted", "Meaning")
    yield _table(head, rows)
    seen: list[dict[str, Any]] = []
    for inner_path, inner in below:
        if inner in seen:
            continue
        seen.append(inner)
        twins = [p for p, other in below if other == inner]
        yield from _object(", ".join(twins) if len(twins) > 1 else inner_path, inner)


def _type(node: dict[str, Any]) -> str:
    if node.get("type") == "array":
        return f"list of {_type(node['items'])}s"
    if "additionalProperties" in node:
        return f"object of {_type(node['additionalProperties'])}s"
    return str(node.get("type", "text or list of texts")).replace("string", "text")


def _default(node: dict[str, Any]) -> str:
    if "properties" in node or "default" not in node:
        return ""
    return _code(text(node["default"]))


def _accepted(node: dict[str, Any]) -> str:
    words = accepted(node)
    if node.get("type") == "string" and "enum" not in node and node.get("pattern") not in PATTERNS:
        return words.removeprefix("a text of ").removeprefix("a text")
    if node.get("type") in ("boolean", "object") or PRESERVE in node:
        return ""
    return words.removeprefix("one of ")


# ---- what goes together ----


def _rules() -> Iterator[str]:
    yield "## What spans several fields\n"
    yield (
        "Refused at admission (`kubectl apply` says it), by `finetune run` and by the condition Accepted alike. What "
        "Kubernetes cannot see (DeepSpeed's own keys, `workers.template`, `target_modules`, `lr_scheduler_kwargs`) is "
        "told by the condition, all mistakes at once, each with field, value, what is accepted and the remedy.\n"
    )
    rows: dict[tuple[str, str, str], None] = {}
    for rule in RULES:
        field = ".".join(part for part in (rule.at, rule.field) if part)
        field = field.replace("spec.data.train[]", "spec.data.*[]").replace("spec.data.eval[].", "spec.data.*[].")
        rows.setdefault((_code(field), rule.accepted, rule.remedy))
    yield _table(("Field", "Accepted", "Else"), list(rows))


def _steering() -> Iterator[str]:
    yield "## What may change while a job runs\n"
    yield (
        "Once `status.startTime` is set, what changes the result or where it lies is fixed: "
        + ", ".join(_code(path) for path in IMMUTABLE)
        + ". Everything else steers the run and may be changed: `spec.suspend`, `spec.ttlSecondsAfterFinished`, "
        "`spec.checkpoint.save_steps` and `save_total_limit`, `spec.workers`, `spec.recovery`, `spec.credentials`, "
        "`spec.profile`.\n"
    )


def _stages() -> Iterator[str]:
    yield "## Stages\n"
    yield "What each is for, with examples: [stages.md](stages.md).\n"
    rows = [
        (
            _code(name),
            stage.told,
            stage.record,
            _yes(stage.packing),
            _yes(stage.generates),
            _code(f"spec.{name}") if stage.parameters else "",
        )
        for name, stage in STAGES.items()
    ]
    head = ("Stage", "What", "Records ([data.md](data.md))", "Packing", "`evaluation.prompts`", "Parameters")
    yield _table(head, rows)


def _compatibility() -> Iterator[str]:
    yield "## Methods\n"
    rows = [
        (
            _code(method),
            ", ".join(row.stages),
            ", ".join(map(str, row.zero_stages)) + f" (default {row.default_zero_stage})",
            _yes(row.packing),
            _yes(row.gradient_checkpointing),
            _yes(row.merge),
            _yes(row.quantized),
        )
        for method, row in COMPATIBILITY.items()
    ]
    head = ("Method", "Stages", "ZeRO stages", "Packing", "Gradient checkpointing", "Merge", "Base model in 4 bits")
    yield _table(head, rows)


def _yes(value: bool) -> str:
    return "yes" if value else "no"


# ---- status ----


def _status() -> Iterator[str]:
    yield from _object("status", status_schema())
    yield "### Columns and field selectors\n"
    yield (
        "`kubectl get ftj` shows "
        + ", ".join(name.upper() for name, _, _, wide in COLUMNS if not wide)
        + "; with `-o wide` also "
        + ", ".join(name.upper() for name, _, _, wide in COLUMNS if wide)
        + ". `--field-selector` takes "
        + ", ".join(_code(path.removeprefix(".")) for path in SELECTABLE)
        + ".\n"
    )
    yield "### States\n"
    yield _table(("State", "Meaning"), [(_code(state), STATES.get(state, "")) for state in State])


def _conditions() -> Iterator[str]:
    yield "## Conditions\n"
    meanings, reasons = _member_docs(conditions, "Condition"), _grouped(conditions, "Reason")
    rows: list[tuple[str, ...]] = []
    for condition in Condition:
        own = [
            Reason[name] for group, names in reasons.items() if condition.value in group.split(", ") for name in names
        ]
        if condition is Condition.STALLED:  # what the others say, where only a person can change it
            own += [Reason.INVALID_SPEC, Reason.UNKNOWN_PROFILE, Reason.INPUT_JOB_FAILED]
        rows.append((_code(condition.value), meanings.get(condition.name, ""), ", ".join(map(_code, own))))
    yield _table(("Type", "True says", "Reasons"), rows)


def _causes() -> Iterator[str]:
    yield "## Causes\n"
    yield "`status.attempts[].cause` says why an attempt ended, and whether the job goes on.\n"
    rows = [(_code(cause), CAUSES.get(cause, ""), RETRIES[RETRY[cause]]) for cause in Cause]
    yield _table(("Cause", "Meaning", "Tried again"), rows)


def _member_docs(module: Any, name: str) -> dict[str, str]:
    """The docstrings below the members of an enum."""
    tree = ast.parse(inspect.getsource(module))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    docs = {}
    for member, doc in pairwise(body):
        if isinstance(member, ast.Assign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
            docs[ast.unparse(member.targets[0])] = re.sub(r"\s*\n\s*", " ", str(doc.value.value)).replace("``", "`")
    return docs


def _grouped(module: Any, name: str) -> dict[str, list[str]]:
    """The members of an enum under the comments above them."""
    groups: dict[str, list[str]] = {}
    current: list[str] = []
    for line in inspect.getsource(getattr(module, name)).splitlines():
        if comment := re.match(r"\s+# (.+)", line):
            current = groups.setdefault(comment[1], [])
        elif member := re.match(r"\s+([A-Z_]+) = ", line):
            current.append(member[1])
    return groups


def main(arguments: list[str] | None = None) -> int:
    return command("reference", __doc__, PATH, rendered, arguments)


if __name__ == "__main__":
    sys.exit(main())
