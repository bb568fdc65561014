"""Specs that users get wrong: one row each, with the words they must be told.

Two tests read the table. ``tests/unit/test_api_mistakes.py`` runs every row through ``mistakes.read``;
``tests/cluster_api/test_admission.py`` applies every row to a real API server and sees that what should be refused
there is, and that the rest is let through to the condition.
"""

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.compatibility import COMPATIBILITY
from finetune_api.methods import METHODS
from finetune_api.schema import spec_schema
from finetune_api.stages import STAGES, TRAINED

GOOD: dict[str, Any] = {
    "apiVersion": "finetune.dev/v1alpha1",
    "kind": "FineTuneJob",
    "metadata": {"name": "tune"},
    "spec": {
        "model": {"uri": "hf://HuggingFaceTB/SmolLM2-135M-Instruct"},
        "data": {"train": [{"uri": "s3://team/rows.jsonl"}]},
        "output": {"uri": "s3://team/models/tune"},
    },
}


class Delete:
    """As a value: the field is taken out."""


SCHEMA = "schema"
"""Refused at admission, in the API server's own words."""
RULE = "rule"
"""Refused at admission by a CEL rule, in our words."""
CONDITION = "condition"
"""Let through by the API server; the Accepted condition tells it."""


@dataclass(frozen=True)
class Bad:
    """One bad spec."""

    id: str
    change: dict[str, Any]
    """Path → value, laid over GOOD."""
    field: str
    """The field that is named."""
    says: str
    """What the message contains."""
    by: str = RULE
    """Who refuses it first."""
    server_says: str = ""
    """What the API server's message contains, where it words it itself; the field always."""

    @property
    def object(self) -> dict[str, Any]:
        """The whole object."""
        return changed(GOOD, self.change)


def changed(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A copy with values at paths such as ``spec.data.train[0].uri``; missing objects are made."""
    result = copy.deepcopy(base)
    for path, value in change.items():
        parts = [int(p) if p.isdigit() else p for p in re.findall(r"[^.\[\]]+", path)]
        parent: Any = result
        for part in parts[:-1]:
            parent = parent.setdefault(part, {}) if isinstance(parent, dict) else parent[part]
        if value is Delete:
            del parent[parts[-1]]
        elif isinstance(parent, list) and parts[-1] == len(parent):
            parent.append(value)
        else:
            parent[parts[-1]] = value
    return result


_S3 = {"spec.model.uri": "s3://team/base"}
_HF_DATA = {"spec.data.train[0].uri": "hf://datasets/tatsu-lab/alpaca"}
_TRAINER = "spec.workers.template.spec.containers"
JUDGED: dict[str, Any] = {"reward_funcs": [{"type": "exact_match"}]}
"""The least that a stage with rollouts needs."""
_ZERO = "spec.deepspeed.zero_optimization"

_ADAPTER: dict[str, Any] = {"uri": "s3://team/first"}

BAD: tuple[Bad, ...] = (
    # ---- adapters made earlier
    Bad(
        "an adapter that is this job's own",
        {"spec.model.adapters": [{"uri": "job://tune"}]},
        "spec.model.adapters",
        "a job cannot wait for itself",
    ),
    Bad(
        "an adapter that is the model",
        {"spec.model": {"uri": "job://first", "adapters": [{"uri": "job://first"}]}},
        "spec.model.adapters",
        "name the base in uri, and its adapters here",
    ),
    Bad(
        "a file of an adapter's repository",
        {"spec.model.adapters": [{"uri": "hf://org/name/adapter_model.safetensors"}]},
        "spec.model.adapters[0].uri",
        "hf://ORG/NAME for an adapter of the hub",
    ),
    Bad(
        "two adapters to train on",
        {"spec.model.adapters": [_ADAPTER | {"train": True}, {"uri": "s3://team/second", "train": True}]},
        "spec.model.adapters",
        "accepted: train: true for the last one only",
    ),
    Bad(
        "the first of two adapters to train on",
        {"spec.model.adapters": [_ADAPTER | {"train": True}, {"uri": "s3://team/second"}]},
        "spec.model.adapters",
        "put the adapter to train on at the end",
    ),
    Bad(
        "an adapter on a GGUF file",
        {"spec.model": {"uri": "s3://team/base", "gguf_file": "a.gguf", "adapters": [_ADAPTER]}},
        "spec.model.adapters",
        "finetune merge",
    ),
    Bad(
        "an adapter to train on with full",
        {"spec.model.adapters": [_ADAPTER | {"train": True}], "spec.method": {"type": "full"}},
        "spec.model.adapters",
        "train: true with spec.method.type lora, qlora",
    ),
    Bad(
        "an adapter to train on under ZeRO-3",
        {"spec.model.adapters": [_ADAPTER | {"train": True}], f"{_ZERO}.stage": 3},
        "spec.model.adapters",
        "choose a lower stage, or remove train: true",
    ),
    # ---- unknown and misspelt fields
    Bad(
        "a misspelt field",
        {"spec.training.learning_rat": 1e-4},
        "spec.training.learning_rat",
        "did you mean learning_rate?",
        SCHEMA,
        "unknown field",
    ),
    Bad(
        "a field in the wrong section",
        {"spec.learning_rate": 1e-4},
        "spec.learning_rate",
        "did you mean spec.training.learning_rate?",
        SCHEMA,
        "unknown field",
    ),
    Bad(
        "snake case where Kubernetes has camel case",
        {"spec.workers.gpus_per_worker": 8},
        "spec.workers.gpus_per_worker",
        "did you mean gpusPerWorker?",
        SCHEMA,
        "unknown field",
    ),
    Bad(
        "camel case where Hugging Face has snake case",
        {"spec.checkpoint.saveSteps": 8},
        "spec.checkpoint.saveSteps",
        "did you mean save_steps?",
        SCHEMA,
        "unknown field",
    ),
    Bad(
        "an unknown field of a source",
        {"spec.data.train[0].wieght": 2},
        "spec.data.train[0].wieght",
        "did you mean weight?",
        SCHEMA,
        "unknown field",
    ),
    Bad(
        "an unknown field without a likely meaning",
        {"spec.output.zzz": 2},
        "spec.output.zzz",
        "one of uri, merge, max_shard_size",
        SCHEMA,
        "unknown field",
    ),
    # ---- missing
    Bad("no model", {"spec.model": Delete}, "spec.model", "it is missing", SCHEMA, "Required"),
    Bad("no uri of the model", {"spec.model": {}}, "spec.model.uri", "it is missing", SCHEMA, "Required"),
    Bad("no data", {"spec.data": Delete}, "spec.data", "it is missing", SCHEMA, "Required"),
    Bad("no training rows", {"spec.data": {}}, "spec.data.train", "it is missing", SCHEMA, "Required"),
    Bad(
        "an empty list of sources",
        {"spec.data.train": []},
        "spec.data.train",
        "a list of 1 to 64",
        SCHEMA,
        "at least 1",
    ),
    Bad("a source without a uri", {"spec.data.train[0]": {}}, "spec.data.train[0].uri", "add it", SCHEMA, "Required"),
    Bad("no output", {"spec.output": Delete}, "spec.output", "it is missing", SCHEMA, "Required"),
    Bad("credentials without a secret", {"spec.credentials": {}}, "spec.credentials.secretName", "missing", SCHEMA),
    # ---- types
    Bad(
        "a number in quotes",
        {"spec.training.learning_rate": "1e-4"},
        "spec.training.learning_rate",
        "write it as a number, without quotes: 0.0001",
        SCHEMA,
        "must be of type number",
    ),
    Bad("a word for a number", {"spec.data.max_length": "long"}, "spec.data.max_length", "a whole number", SCHEMA),
    Bad(
        "a word for a count", {"spec.workers.replicas": "two"}, "spec.workers.replicas", "write a whole number", SCHEMA
    ),
    Bad(
        "a length of time for seconds",
        {"spec.ttlSecondsAfterFinished": "1h"},
        "spec.ttlSecondsAfterFinished",
        "write a whole number of seconds; here: 3600",
        SCHEMA,
        "must be of type integer",
    ),
    Bad("true in quotes", {"spec.suspend": "true"}, "spec.suspend", "remedy: write it without quotes", SCHEMA),
    Bad("a fraction of a worker", {"spec.workers.replicas": 1.5}, "spec.workers.replicas", "a whole number", SCHEMA),
    Bad("yes for true", {"spec.data.packing": "yes"}, "spec.data.packing", "true or false", SCHEMA),
    Bad("a number for a branch", {"spec.model.revision": 3}, "spec.model.revision", "put it into quotes", SCHEMA),
    Bad(
        "one source, no list", {"spec.data.train": {"uri": "s3://a/b.jsonl"}}, "spec.data.train", "write a list", SCHEMA
    ),
    Bad("a text for the training", {"spec.training": "fast"}, "spec.training", "write its fields below it", SCHEMA),
    Bad("a text for the method", {"spec.method": "lora"}, "spec.method", "an object", SCHEMA),
    Bad("a prompt that is a number", {"spec.evaluation.prompts": [1]}, "spec.evaluation.prompts[0]", "a text", SCHEMA),
    Bad("null for what is required", {"spec.output.uri": None}, "spec.output.uri", "pvc://CLAIM/PATH", SCHEMA),
    # ---- ranges
    Bad(
        "a negative learning rate",
        {"spec.training.learning_rate": -1},
        "spec.training.learning_rate",
        "-1 is not accepted; accepted: a number greater than 0 and at most 10; remedy: choose such a value",
        SCHEMA,
        "should be greater than 0",
    ),
    Bad(
        "a learning rate of zero", {"spec.training.learning_rate": 0}, "spec.training.learning_rate", "greater", SCHEMA
    ),
    Bad("no epoch", {"spec.training.num_train_epochs": 0}, "spec.training.num_train_epochs", "greater than 0", SCHEMA),
    Bad(
        "an empty batch",
        {"spec.training.per_device_train_batch_size": 0},
        "spec.training.per_device_train_batch_size",
        "a whole number from 1 to 65536",
        SCHEMA,
    ),
    Bad("certain dropout", {"spec.method.lora_dropout": 1.0}, "spec.method.lora_dropout", "less than 1", SCHEMA),
    Bad("rank zero", {"spec.method.r": 0}, "spec.method.r", "from 1", SCHEMA),
    Bad("sequences too short", {"spec.data.max_length": 8}, "spec.data.max_length", "from 16", SCHEMA),
    Bad("no worker", {"spec.workers.replicas": 0}, "spec.workers.replicas", "from 1", SCHEMA),
    Bad("negative GPUs", {"spec.workers.gpusPerWorker": -1}, "spec.workers.gpusPerWorker", "from 0", SCHEMA),
    Bad("weight zero", {"spec.data.train[0].weight": 0}, "spec.data.train[0].weight", "greater than 0", SCHEMA),
    Bad("a negative seed", {"spec.training.seed": -1}, "spec.training.seed", "from 0", SCHEMA),
    Bad("a negative TTL", {"spec.ttlSecondsAfterFinished": -1}, "spec.ttlSecondsAfterFinished", "from 0", SCHEMA),
    Bad("no checkpoint kept", {"spec.checkpoint.save_total_limit": 0}, "spec.checkpoint.save_total_limit", "1", SCHEMA),
    Bad(
        "an endless uri", {"spec.output.uri": "s3://" + "x" * 1020}, "spec.output.uri", "shorten it", SCHEMA, "Too long"
    ),
    # ---- choices
    Bad("an unknown stage", {"spec.stage": "sftt"}, "spec.stage", "did you mean sft?", SCHEMA, "Unsupported value"),
    Bad("an unknown method", {"spec.method.type": "lorra"}, "spec.method.type", "did you mean lora?", SCHEMA),
    Bad("an unknown format", {"spec.data.train[0].format": "openai"}, "spec.data.train[0].format", "messages", SCHEMA),
    Bad(
        "an unknown schedule",
        {"spec.training.lr_scheduler_type": "cosin"},
        "spec.training.lr_scheduler_type",
        "cosine?",
        SCHEMA,
    ),
    Bad("half precision", {"spec.model.dtype": "float16"}, "spec.model.dtype", "bfloat16", SCHEMA),
    Bad("ZeRO-4", {f"{_ZERO}.stage": 4}, f"{_ZERO}.stage", "a whole number from 0 to 3", SCHEMA),
    Bad("true for a ZeRO stage", {f"{_ZERO}.stage": True}, f"{_ZERO}.stage", "a whole number from 0 to 3", SCHEMA),
    # ---- names and places
    Bad(
        "a name with upper case",
        {"metadata.name": "Tune"},
        "metadata.name",
        "letters",
        SCHEMA,
        "RFC 1123",
    ),
    Bad("a name that begins with a digit", {"metadata.name": "7b"}, "metadata.name", "beginning with a letter"),
    Bad("a name with a dot", {"metadata.name": "llama-3.1"}, "metadata.name", "lower-case letters, digits and -"),
    Bad("a name too long for its pods", {"metadata.name": "x" * 52}, "metadata.name", "at most 51"),
    Bad(
        "a model without a scheme",
        {"spec.model.uri": "HuggingFaceTB/SmolLM2-135M"},
        "spec.model.uri",
        "a model of the Hugging Face hub is hf://ORG/NAME",
    ),
    Bad(
        "the web address of a model",
        {"spec.model.uri": "https://huggingface.co/a/b"},
        "spec.model.uri",
        "hf://ORG/NAME",
    ),
    Bad("a path for a uri", {"spec.output.uri": "/mnt/out"}, "spec.output.uri", "pvc://CLAIM/PATH or file:///PATH"),
    Bad("a relative file", {"spec.output.uri": "file://out"}, "spec.output.uri", "file:///PATH"),
    Bad(
        "a relative path of rows",
        {"spec.data.train[0].uri": "./rows.jsonl"},
        "spec.data.train[0].uri",
        "a file has an absolute path",
    ),
    Bad(
        "output to the hub", {"spec.output.uri": "hf://me/model"}, "spec.output.uri", "a storage that can be written to"
    ),
    Bad("checkpoints to the hub", {"spec.checkpoint.uri": "hf://me/x"}, "spec.checkpoint.uri", "can be written to"),
    Bad("rows of nothing", {"spec.data.train[0].uri": "job://"}, "spec.data.train[0].uri", "hf://datasets/ORG/NAME"),
    Bad("its own rows", {"spec.data.train[0].uri": "job://tune"}, "spec.data", "a job cannot wait for itself"),
    Bad("its own held-out rows", {"spec.data.eval": [{"uri": "job://tune"}]}, "spec.data", "cannot wait for itself"),
    Bad(
        "rows of a job with an impossible name",
        {"spec.data.train[0].uri": f"job://{'x' * 52}"},
        "spec.data.train[0].uri",
        "at most 51",
    ),
    Bad(
        "held-out rows of a job with an impossible name",
        {"spec.data.eval": [{"uri": f"job://{'x' * 52}"}]},
        "spec.data.eval[0].uri",
        "at most 51",
    ),
    Bad("a file of the hub", {"spec.model.uri": "hf://a/b/weights"}, "spec.model.uri", "a file into gguf_file"),
    Bad("a branch in the uri", {"spec.model.uri": "hf://a/b@main"}, "spec.model.uri", "goes into revision"),
    Bad(
        "a data set as the model",
        {"spec.model.uri": "hf://datasets/a/b"},
        "spec.model.uri",
        "hf://ORG/NAME for a model",
    ),
    Bad("a GGUF file as the folder", {"spec.model.uri": "s3://a/m.gguf"}, "spec.model.uri", "the file in gguf_file"),
    Bad("a model as data", {"spec.data.train[0].uri": "hf://a/b"}, "spec.data.train[0].uri", "datasets/ after hf://"),
    Bad("a spreadsheet", {"spec.data.train[0].uri": "s3://a/rows.xlsx"}, "spec.data.train[0].uri", "tables as .csv"),
    Bad(
        "an archive of held-out rows",
        {"spec.data.eval": [{"uri": "s3://a/b.jsonl"}, {"uri": "s3://a/rows.tar.gz"}]},
        "spec.data.eval[1].uri",
        "unpack archives",
    ),
    Bad(
        "a claim no volume can have", {"spec.model.uri": "pvc://My_Claim/x"}, "spec.model.uri", "PersistentVolumeClaim"
    ),
    Bad("a claim of the rows", {"spec.data.train[0].uri": "pvc://A/x.jsonl"}, "spec.data.train[0].uri", "Claim"),
    Bad("a claim of held-out rows", {"spec.data.eval": [{"uri": "pvc://A/x.json"}]}, "spec.data.eval[0].uri", "Claim"),
    Bad("a claim of the output", {"spec.output.uri": "pvc://a.b/x"}, "spec.output.uri", "PersistentVolumeClaim"),
    Bad("a claim of checkpoints", {"spec.checkpoint.uri": "pvc://-/x"}, "spec.checkpoint.uri", "PersistentVolumeClaim"),
    Bad("itself as the input", {"spec.model.uri": "job://tune"}, "spec.model.uri", "a job cannot wait for itself"),
    Bad("a job with an impossible name", {"spec.model.uri": f"job://{'x' * 52}"}, "spec.model.uri", "at most 51"),
    Bad("the base model overwritten", {**_S3, "spec.output.uri": "s3://team/base"}, "spec.output.uri", "overwritten"),
    Bad(
        "a secret with a bad name", {"spec.credentials.secretName": "My_Secret"}, "spec.credentials.secretName", "lower"
    ),
    Bad("a profile with a bad name", {"spec.profile": "H100!"}, "spec.profile", "lower-case letters"),
    Bad(
        "a part of a split",
        {"spec.data.train": [{"uri": "hf://datasets/org/name", "split": "train[:90%]"}]},
        "spec.data.train[0].split",
        "write a name alone",
    ),
    Bad("a size without a unit", {"spec.output.max_shard_size": "5"}, "spec.output.max_shard_size", "add the unit"),
    # ---- the model and the sources, over several fields
    Bad(
        "a revision of a bucket",
        {**_S3, "spec.model.revision": "v2"},
        "spec.model.revision",
        "only the hub has branches",
    ),
    Bad("a revision of a file", {"spec.data.train[0].revision": "v2"}, "spec.data.train[0].revision", "not hf://"),
    Bad("a split of a file", {"spec.data.train[0].split": "test"}, "spec.data.train[0].split", "remove split"),
    Bad(
        "a split of a held-out file",
        {"spec.data.eval": [{"uri": "s3://a/b.jsonl", "split": "test"}]},
        "spec.data.eval[0].split",
        "remove split",
    ),
    Bad(
        "a revision of a held-out file",
        {"spec.data.eval": [{"uri": "s3://a/b.jsonl", "revision": "x"}]},
        "spec.data.eval[0].revision",
        "remove revision",
    ),
    Bad(
        "a model as held-out rows",
        {"spec.data.eval": [{"uri": "hf://a/b"}]},
        "spec.data.eval[0].uri",
        "datasets/ after hf://",
    ),
    Bad("a GGUF path", {"spec.model.gguf_file": "q4/model.gguf"}, "spec.model.gguf_file", "only the file here"),
    Bad("no GGUF file", {"spec.model.gguf_file": "model.safetensors"}, "spec.model.gguf_file", "ends in .gguf"),
    Bad(
        "GGUF of a job's output",
        {"spec.model": {"uri": "job://first", "gguf_file": "x.gguf"}},
        "spec.model.gguf_file",
        "the output of a FineTuneJob is safetensors",
    ),
    Bad(
        "the same rows twice",
        {"spec.data.train[1]": {"uri": "s3://team/rows.jsonl"}},
        "spec.data.train",
        "set its weight",
    ),
    Bad(
        "the same held-out rows twice",
        {"spec.data.eval": [{"uri": "s3://a/b.jsonl"}, {"uri": "s3://a/b.jsonl"}]},
        "spec.data.eval",
        "named more than once",
    ),
    Bad(
        "weighted held-out rows",
        {"spec.data.eval": [{"uri": "s3://a/b.jsonl", "weight": 2}]},
        "spec.data.eval[0].weight",
        "for training rows only",
    ),
    Bad(
        "conversations for DPO",
        {"spec.stage": "dpo", "spec.data.train[0].format": "alpaca"},
        "spec.data.train",
        "gives nothing that spec.stage learns from",
    ),
    Bad(
        "held-out texts for SFT",
        {"spec.data.eval": [{"uri": "s3://a/b.jsonl", "format": "text"}]},
        "spec.data.eval",
        "choose another format or another spec.stage",
    ),
    Bad(
        "a factor without a type",
        {"spec.model.rope_parameters": {"factor": 4}},
        "spec.model.rope_parameters.factor",
        "set both",
    ),
    Bad(
        "a type without a factor",
        {"spec.model.rope_parameters": {"rope_type": "yarn"}},
        "spec.model.rope_parameters.factor",
        "set both",
    ),
    Bad(
        "the path of a template",
        {"spec.data.chat_template": "templates/mine.jinja"},
        "spec.data.chat_template",
        "the template's text (not its path)",
    ),
    # ---- the method
    Bad(
        "a rank without an adapter",
        {"spec.method": {"type": "full", "r": 8}},
        "spec.method.r",
        "8 is not accepted; accepted: r with spec.method.type lora, qlora, ",
    ),
    Bad(
        "alpha without an adapter",
        {"spec.method": {"type": "full", "lora_alpha": 8}},
        "spec.method.lora_alpha",
        "remove it",
    ),
    Bad(
        "dropout without one",
        {"spec.method": {"type": "full", "lora_dropout": 0}},
        "spec.method.lora_dropout",
        "remove",
    ),
    Bad("DoRA without one", {"spec.method": {"type": "full", "use_dora": True}}, "spec.method.use_dora", "remove it"),
    Bad(
        "rsLoRA without one",
        {"spec.method": {"type": "full", "use_rslora": True}},
        "spec.method.use_rslora",
        "remove it",
    ),
    Bad(
        "modules to save without one",
        {"spec.method": {"type": "full", "modules_to_save": ["lm_head"]}},
        "spec.method.modules_to_save",
        "remove it",
    ),
    Bad(
        "4 bits for lora", {"spec.method.bnb_4bit_quant_type": "nf4"}, "spec.method.bnb_4bit_quant_type", "type: qlora"
    ),
    Bad(
        "double quantisation for lora",
        {"spec.method.bnb_4bit_use_double_quant": True},
        "spec.method.bnb_4bit_use_double_quant",
        "set spec.method.type: qlora",
    ),
    Bad(
        "modules without an adapter",
        {"spec.method": {"type": "full", "target_modules": ["q_proj"]}},
        "spec.method.target_modules",
        "remove it",
        CONDITION,
    ),
    Bad(
        "no target module", {"spec.method.target_modules": []}, "spec.method.target_modules", "at least one", CONDITION
    ),
    Bad(
        "a variable that is a number",
        {"spec.workers.template": {"spec": {"containers": [{"name": "trainer", "env": [{"name": "A", "value": 1}]}]}}},
        "spec.workers.template.spec.containers[0].env[0].value",
        "put it into quotes",
        CONDITION,
    ),
    Bad(
        "a column's name that YAML made true of",
        {"spec.data.train[0].columns": {"x": "prompt", "true": "completion"}},
        "spec.data.train[0].columns[true]",
        "the name of a column; YAML reads y, yes, on as true",
        CONDITION,
    ),
    Bad(
        "a column's name that YAML made false of",
        {"spec.data.eval": [{"uri": "s3://team/held-out.jsonl", "columns": {"false": "completion"}}]},
        "spec.data.eval[0].columns[false]",
        "put the column's name into quotes",
        CONDITION,
    ),
    Bad("an empty target", {"spec.method.target_modules": ""}, "spec.method.target_modules", "at least one", CONDITION),
    Bad(
        "a number as target",
        {"spec.method.target_modules": 3},
        "spec.method.target_modules",
        "a list of texts",
        CONDITION,
    ),
    Bad(
        "a number in the targets",
        {"spec.method.target_modules": ["a", 3]},
        "spec.method.target_modules",
        "list",
        CONDITION,
    ),
    Bad(
        "a target twice",
        {"spec.method.target_modules": ["a", "a"]},
        "spec.method.target_modules",
        "repeated",
        CONDITION,
    ),
    Bad(
        "targets as one text",
        {"spec.method.target_modules": "q_proj,v_proj"},
        "spec.method.target_modules",
        "write a list: [q_proj, v_proj]",
        CONDITION,
    ),
    Bad(
        "a broken pattern", {"spec.method.target_modules": "(q_proj"}, "spec.method.target_modules", "valid", CONDITION
    ),
    Bad(
        "a module by both ways",
        {"spec.method.target_modules": ["lm_head"], "spec.method.modules_to_save": ["lm_head"]},
        "spec.method.target_modules",
        "not both",
        CONDITION,
    ),
    Bad(
        "a merge of nothing",
        {"spec.method": {"type": "full"}, "spec.output.merge": True},
        "spec.output.merge",
        "whole model",
    ),
    Bad(
        "4 bits over ZeRO-3",
        {"spec.method": {"type": "qlora"}, f"{_ZERO}.stage": 3},
        f"{_ZERO}.stage",
        "3 is not accepted; accepted: one of 0, 1, 2 with spec.method.type: qlora",
    ),
    Bad("no tasks", {"spec.method": {"type": "moelora"}}, "spec.method.tasks", "list the names that the rows have"),
    Bad(
        "a task twice",
        {"spec.method": {"type": "moelora", "tasks": ["a", "b", "a"]}},
        "spec.method.tasks",
        "every task of the rows once",
    ),
    Bad(
        "a task that is no folder's name",
        {"spec.method": {"type": "moelora", "tasks": ["Named Entities"]}},
        "spec.method.tasks[0]",
        "a name of lower-case letters, digits, - and .",
        SCHEMA,
    ),
    Bad(
        "experts of no whole rank",
        {"spec.method": {"type": "moelora", "tasks": ["a"], "num_experts": 3}},
        "spec.method.num_experts",
        "so that every expert has a whole rank",
    ),
    Bad(
        "a variant of no paper",
        {"spec.method": {"type": "adapter", "adapter_variant": "serial"}},
        "spec.method.adapter_variant",
        "one of houlsby, pfeiffer, parallel",
        SCHEMA,
    ),
    Bad(
        "a merged adapter",
        {"spec.method": {"type": "adapter"}, "spec.output.merge": True},
        "spec.output.merge",
        "no part of any weight",
    ),
    Bad(
        "ranks that cannot fall",
        {"spec.method": {"type": "adalora", "target_r": 12}},
        "spec.method.target_r",
        "lower target_r, or raise init_r",
    ),
    Bad(
        "a text to begin with that is not used",
        {"spec.method": {"type": "prompt_tuning", "prompt_tuning_init_text": "Classify:"}},
        "spec.method.prompt_tuning_init_text",
        "write both, or neither",
    ),
    Bad(
        "no text to begin with",
        {"spec.method": {"type": "prompt_tuning", "prompt_tuning_init": "TEXT"}},
        "spec.method.prompt_tuning_init_text",
        "write both, or neither",
    ),
    Bad(
        "no token", {"spec.method": {"type": "trainable_tokens"}}, "spec.method.token_indices", "convert_tokens_to_ids"
    ),
    Bad(
        "PiSSA in 4 bits",
        {"spec.method": {"type": "qlora", "init_lora_weights": "pissa"}},
        "spec.method.init_lora_weights",
        "set spec.method.type: lora",
    ),
    Bad(
        "PiSSA over ZeRO-3",
        {"spec.method.init_lora_weights": "pissa", f"{_ZERO}.stage": 3},
        "spec.method.init_lora_weights",
        "choose a lower stage",
    ),
    Bad(
        "a schedule longer than the run",
        {"spec.method": {"type": "adalora", "tinit": 60, "tfinal": 40}, "spec.training.max_steps": 100},
        "spec.method.tinit",
        "lower tinit or tfinal",
        CONDITION,
    ),
    Bad(
        "a bf16 section with AdaLoRA",
        {"spec.method": {"type": "adalora"}, "spec.deepspeed.bf16": {"enabled": True}},
        "spec.deepspeed.bf16.enabled",
        "the adapter stays float32",
        CONDITION,
    ),
    Bad(
        "layers by number and by pattern",
        {"spec.method": {"target_modules": r".*q_proj", "layers_to_transform": [1]}},
        "spec.method.target_modules",
        "remove layers_to_transform",
        CONDITION,
    ),
    Bad(
        "a broken pattern of weights",
        {"spec.method": {"type": "freeze", "freeze_trainable_modules": "(mlp"}},
        "spec.method.freeze_trainable_modules",
        "valid regular expression",
        CONDITION,
    ),
    # ---- the optimisation
    Bad("no step", {"spec.training.max_steps": 0}, "spec.training.max_steps", "to train num_train_epochs epochs"),
    Bad(
        "one and a half steps of warm-up", {"spec.training.warmup_steps": 1.5}, "spec.training.warmup_steps", "round it"
    ),
    Bad(
        "more warm-up than steps",
        {"spec.training.warmup_steps": 100, "spec.training.max_steps": 10},
        "spec.training.warmup_steps",
        "100 is not accepted; accepted: at most max_steps",
    ),
    Bad(
        "warm-up to a constant",
        {"spec.training.warmup_steps": 10, "spec.training.lr_scheduler_type": "constant"},
        "spec.training.warmup_steps",
        "constant_with_warmup",
    ),
    Bad(
        "evaluation of nothing", {"spec.training.eval_steps": 10}, "spec.training.eval_steps", "spec.data.eval is empty"
    ),
    Bad("an empty prompt", {"spec.evaluation.prompts": ["a", ""]}, "spec.evaluation.prompts", "remove the empty one"),
    Bad(
        "a misspelt argument of the schedule",
        {"spec.training.lr_scheduler_kwargs": {"num_cycle": 2}},
        "spec.training.lr_scheduler_kwargs.num_cycle",
        "write num_cycles",
        CONDITION,
    ),
    Bad(
        "an argument of another schedule",
        {"spec.training.lr_scheduler_kwargs": {"power": 2}},
        "spec.training.lr_scheduler_kwargs.power",
        "set lr_scheduler_type: polynomial",
        CONDITION,
    ),
    Bad(
        "a lowest rate that is not named",
        {"spec.training.lr_scheduler_type": "cosine_with_min_lr"},
        "spec.training.lr_scheduler_kwargs",
        "add e.g. min_lr_rate: 0.1",
        CONDITION,
    ),
    Bad(
        "two lowest rates",
        {
            "spec.training.lr_scheduler_type": "cosine_with_min_lr",
            "spec.training.lr_scheduler_kwargs": {"min_lr": 1e-6, "min_lr_rate": 0.1},
        },
        "spec.training.lr_scheduler_kwargs",
        "remove one of them",
        CONDITION,
    ),
    Bad(
        "a lowest rate above the highest",
        {
            "spec.training.lr_scheduler_type": "cosine_with_min_lr",
            "spec.training.lr_scheduler_kwargs": {"min_lr": 1},
        },
        "spec.training.lr_scheduler_kwargs.min_lr",
        "less than learning_rate, 0.0002",
        CONDITION,
    ),
    Bad(
        "a share above one",
        {
            "spec.training.lr_scheduler_type": "cosine_with_min_lr",
            "spec.training.lr_scheduler_kwargs": {"min_lr_rate": 10},
        },
        "spec.training.lr_scheduler_kwargs.min_lr_rate",
        "a share of learning_rate",
        CONDITION,
    ),
    Bad(
        "a text for a number of cycles",
        {"spec.training.lr_scheduler_kwargs": {"num_cycles": "2"}},
        "spec.training.lr_scheduler_kwargs.num_cycles",
        "without quotes",
        CONDITION,
    ),
    # ---- recovery
    Bad(
        "no unit of time",
        {"spec.recovery.hangTimeout": "600"},
        "spec.recovery.hangTimeout",
        "such as 90s, 10m or 1h30m",
    ),
    Bad("a number of seconds", {"spec.recovery.hangTimeout": 600}, "spec.recovery.hangTimeout", "its unit", SCHEMA),
    Bad("too impatient", {"spec.recovery.hangTimeout": "5s"}, "spec.recovery.hangTimeout", "from 30s to 168h"),
    Bad("too patient", {"spec.recovery.hangTimeout": "1000h"}, "spec.recovery.hangTimeout", "from 30s to 168h"),
    Bad("no time to start", {"spec.recovery.startTimeout": "30s"}, "spec.recovery.startTimeout", "from 1m to 168h"),
    Bad("no time for a place", {"spec.recovery.pendingTimeout": "0s"}, "spec.recovery.pendingTimeout", "from 10s to"),
    # ---- DeepSpeed
    Bad(
        "another clipping",
        {"spec.deepspeed.gradient_clipping": 0.5},
        "spec.deepspeed.gradient_clipping",
        "0.5 is not accepted; accepted: 1, as spec.training.max_grad_norm says, or auto",
        CONDITION,
    ),
    Bad(
        "another micro batch",
        {"spec.deepspeed.train_micro_batch_size_per_gpu": 4},
        "spec.deepspeed.train_micro_batch_size_per_gpu",
        "set spec.training.per_device_train_batch_size",
        CONDITION,
    ),
    Bad(
        "another accumulation",
        {"spec.deepspeed.gradient_accumulation_steps": 4},
        "spec.deepspeed.gradient_accumulation_steps",
        "as spec.training.gradient_accumulation_steps says",
        CONDITION,
    ),
    Bad(
        "another batch",
        {"spec.deepspeed.train_batch_size": 32, "spec.workers": {"replicas": 2, "gpusPerWorker": 8}},
        "spec.deepspeed.train_batch_size",
        "accepted: 16, as",
        CONDITION,
    ),
    Bad(
        "another learning rate",
        {"spec.deepspeed.optimizer": {"type": "AdamW", "params": {"lr": 0.1}}},
        "spec.deepspeed.optimizer.params.lr",
        "as spec.training.learning_rate says",
        CONDITION,
    ),
    Bad(
        "other betas",
        {"spec.deepspeed.optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}}},
        "spec.deepspeed.optimizer.params.betas",
        "[0.9, 0.999], as spec.training.adam_beta1 and adam_beta2",
        CONDITION,
    ),
    Bad(
        "another weight decay",
        {"spec.deepspeed.optimizer.params.weight_decay": 0.1},
        "spec.deepspeed.optimizer.params.weight_decay",
        "set spec.training.weight_decay",
        CONDITION,
    ),
    Bad(
        "another epsilon",
        {"spec.deepspeed.optimizer.params.eps": 0.1},
        "spec.deepspeed.optimizer.params.eps",
        "set spec.training.adam_epsilon",
        CONDITION,
    ),
    Bad(
        "another optimizer",
        {"spec.deepspeed.optimizer.type": "Lamb"},
        "spec.deepspeed.optimizer.type",
        "AdamW",
        CONDITION,
    ),
    Bad(
        "a second schedule",
        {"spec.deepspeed.scheduler": {"type": "WarmupLR"}},
        "spec.deepspeed.scheduler",
        "set spec.training.lr_scheduler_type",
        CONDITION,
    ),
    Bad("fp16", {"spec.deepspeed.fp16": {"enabled": True}}, "spec.deepspeed.fp16.enabled", "bfloat16", CONDITION),
    Bad(
        "bf16 against float32",
        {"spec.deepspeed.bf16": {"enabled": True}, "spec.model.dtype": "float32"},
        "spec.deepspeed.bf16.enabled",
        "false, as spec.model.dtype: float32 says",
        CONDITION,
    ),
    Bad(
        "bf16 on the CPU",
        {"spec.deepspeed.bf16": {"enabled": True}, "spec.workers.gpusPerWorker": 0},
        "spec.deepspeed.bf16.enabled",
        "auto with spec.workers.gpusPerWorker: 0",
        CONDITION,
    ),
    Bad(
        "elastic DeepSpeed", {"spec.deepspeed.elasticity": {}}, "spec.deepspeed.elasticity", "batch is kept", CONDITION
    ),
    Bad(
        "sequences cut by DeepSpeed",
        {"spec.deepspeed.sequence_parallel_size": 2},
        "spec.deepspeed.sequence_parallel_size",
        "not cut over processes",
        CONDITION,
    ),
    Bad(
        "DeepSpeed's own figures",
        {"spec.deepspeed.wandb": {"enabled": True}},
        "spec.deepspeed.wandb",
        "metrics.jsonl",
        CONDITION,
    ),
    Bad(
        "a misspelt section of DeepSpeed",
        {"spec.deepspeed.zero_optimisation": {"stage": 2}},
        "spec.deepspeed.zero_optimisation",
        "write zero_optimization",
        CONDITION,
    ),
    Bad(
        "a misspelt key of ZeRO",
        {f"{_ZERO}.stage3_param_persistance_threshold": 1},
        f"{_ZERO}.stage3_param_persistance_threshold",
        "write stage3_param_persistence_threshold",
        CONDITION,
    ),
    Bad(
        "offloading the optimizer without ZeRO",
        {f"{_ZERO}.offload_optimizer": {"device": "cpu"}},
        f"{_ZERO}.offload_optimizer",
        "here stage is 0 (by default with lora)",
        CONDITION,
    ),
    Bad(
        "offloading weights below ZeRO-3",
        {f"{_ZERO}": {"stage": 2, "offload_param": {"device": "cpu"}}},
        f"{_ZERO}.offload_param",
        "set spec.deepspeed.zero_optimization.stage: 3",
        CONDITION,
    ),
    Bad(
        "offloading to nowhere",
        {f"{_ZERO}": {"stage": 3, "offload_param": {"device": "disk"}}},
        f"{_ZERO}.offload_param",
        "name the device",
        CONDITION,
    ),
    Bad(
        "NVMe without a path",
        {f"{_ZERO}": {"stage": 3, "offload_param": {"device": "nvme"}}},
        f"{_ZERO}.offload_param",
        "add nvme_path",
        CONDITION,
    ),
    Bad("a key of old", {f"{_ZERO}.cpu_offload": True}, f"{_ZERO}.cpu_offload", "{device: cpu}", CONDITION),
    # ---- the pod template
    Bad(
        "containers in the wrong place",
        {"spec.workers.template.containers": []},
        "spec.workers.template.containers",
        "write it as spec.workers.template.spec.containers",
        CONDITION,
    ),
    Bad(
        "a name of pods",
        {"spec.workers.template.metadata": {"name": "x"}},
        "spec.workers.template.metadata.name",
        "Job names",
        CONDITION,
    ),
    Bad(
        "a label that is a number",
        {"spec.workers.template.metadata": {"labels": {"team": 7}}},
        "spec.workers.template.metadata.labels[team]",
        "put it into quotes",
        CONDITION,
    ),
    Bad(
        "the operator's label",
        {"spec.workers.template.metadata": {"labels": {"finetune.dev/job": "x"}}},
        "spec.workers.template.metadata.labels[finetune.dev/job]",
        "the operator finds its pods by this label",
        CONDITION,
    ),
    Bad(
        "labels that are no object",
        {"spec.workers.template.metadata": {"labels": []}},
        "spec.workers.template.metadata.labels",
        "name: value",
        CONDITION,
    ),
    Bad(
        "metadata that is no object",
        {"spec.workers.template.metadata": 3},
        "spec.workers.template.metadata",
        "labels",
        CONDITION,
    ),
    Bad(
        "a spec that is no object",
        {"spec.workers.template.spec": []},
        "spec.workers.template.spec",
        "pod's spec",
        CONDITION,
    ),
    Bad(
        "a restart policy",
        {"spec.workers.template.spec.restartPolicy": "Always"},
        "spec.workers.template.spec.restartPolicy",
        "spec.recovery says what happens then",
        CONDITION,
    ),
    Bad(
        "a host name",
        {"spec.workers.template.spec.hostname": "x"},
        "spec.workers.template.spec.hostname",
        "workers find each other by the names",
        CONDITION,
    ),
    Bad(
        "a subdomain",
        {"spec.workers.template.spec.subdomain": "x"},
        "spec.workers.template.spec.subdomain",
        "the operator's Service",
        CONDITION,
    ),
    Bad(
        "a deadline of pods",
        {"spec.workers.template.spec.activeDeadlineSeconds": 60},
        "spec.workers.template.spec.activeDeadlineSeconds",
        "spec.training.max_steps",
        CONDITION,
    ),
    Bad(
        "a misspelt field of pods",
        {"spec.workers.template.spec.toleration": []},
        "spec.workers.template.spec.toleration",
        "write tolerations",
        CONDITION,
    ),
    Bad(
        "a node selector that is no object",
        {"spec.workers.template.spec.nodeSelector": ["a"]},
        "spec.workers.template.spec.nodeSelector",
        "write its fields below it",
        CONDITION,
    ),
    Bad(
        "true as a label of nodes",
        {"spec.workers.template.spec.nodeSelector": {"gpu": True}},
        "spec.workers.template.spec.nodeSelector[gpu]",
        "put it into quotes",
        CONDITION,
    ),
    Bad(
        "one toleration, no list",
        {"spec.workers.template.spec.tolerations": {"operator": "Exists"}},
        "spec.workers.template.spec.tolerations",
        "begins with -",
        CONDITION,
    ),
    Bad(
        "names of pull secrets alone",
        {"spec.workers.template.spec.imagePullSecrets": ["registry"]},
        "spec.workers.template.spec.imagePullSecrets",
        "as name: value",
        CONDITION,
    ),
    Bad(
        "yes for true in the pod",
        {"spec.workers.template.spec.hostNetwork": "yes"},
        "spec.workers.template.spec.hostNetwork",
        "true or false",
        CONDITION,
    ),
    Bad(
        "a length of time for the pod's grace",
        {"spec.workers.template.spec.terminationGracePeriodSeconds": "5m"},
        "spec.workers.template.spec.terminationGracePeriodSeconds",
        "a whole number",
        CONDITION,
    ),
    Bad(
        "a number as a service account",
        {"spec.workers.template.spec.serviceAccountName": 7},
        "spec.workers.template.spec.serviceAccountName",
        "put it into quotes",
        CONDITION,
    ),
    Bad(
        "containers that are no list", {_TRAINER: {"image": "x"}}, _TRAINER, "begin every entry with - name:", CONDITION
    ),
    Bad("a container without a name", {_TRAINER: [{"image": "x"}]}, f"{_TRAINER}[0]", "is named trainer", CONDITION),
    Bad("a container twice", {_TRAINER: [{"name": "a"}, {"name": "a"}]}, f"{_TRAINER}[1].name", "one entry", CONDITION),
    Bad(
        "a volume without a name",
        {"spec.workers.template.spec.volumes": [{}]},
        "spec.workers.template.spec.volumes[0]",
        "add name",
        CONDITION,
    ),
    Bad(
        "another command",
        {_TRAINER: [{"name": "trainer", "command": ["x"]}]},
        f"{_TRAINER}[0].command",
        "starts",
        CONDITION,
    ),
    Bad(
        "other arguments", {_TRAINER: [{"name": "trainer", "args": ["x"]}]}, f"{_TRAINER}[0].args", "starts", CONDITION
    ),
    Bad(
        "another number of GPUs",
        {_TRAINER: [{"name": "trainer", "resources": {"limits": {"nvidia.com/gpu": 8}}}]},
        f"{_TRAINER}[0].resources.limits[nvidia.com/gpu]",
        "8 is not accepted; accepted: 1, as spec.workers.gpusPerWorker says",
        CONDITION,
    ),
    Bad(
        "torchrun's variable",
        {_TRAINER: [{"name": "trainer", "env": [{"name": "WORLD_SIZE", "value": "4"}]}]},
        f"{_TRAINER}[0].env[0].name",
        "operator and torchrun set it",
        CONDITION,
    ),
    Bad(
        "the operator's variable",
        {_TRAINER: [{"name": "trainer", "env": [{"name": "FINETUNE_ATTEMPT", "value": "4"}]}]},
        f"{_TRAINER}[0].env[0].name",
        "names other than FINETUNE_",
        CONDITION,
    ),
    Bad(
        "the operator's volume",
        {"spec.workers.template.spec.volumes": [{"name": "config", "emptyDir": {}}]},
        "spec.workers.template.spec.volumes[0].name",
        "choose another name",
        CONDITION,
    ),
    Bad(
        "a claim for the cache",
        {"spec.workers.template.spec.volumes": [{"name": "cache", "persistentVolumeClaim": {"claimName": "x"}}]},
        "spec.workers.template.spec.volumes[0].persistentVolumeClaim",
        "cache.claimName of a profile",
        CONDITION,
    ),
    Bad(
        "the best of no evaluations",
        {"spec.training.load_best_model_at_end": True},
        "spec.training.load_best_model_at_end",
        "add held-out rows in spec.data.eval",
    ),
    Bad(
        "patience without evaluations",
        {"spec.training.early_stopping_patience": 3},
        "spec.training.early_stopping_patience",
        "add held-out rows in spec.data.eval",
    ),
    Bad(
        "a look at nothing before training",
        {"spec.training.eval_on_start": True},
        "spec.training.eval_on_start",
        "add held-out rows in spec.data.eval",
    ),
    Bad(
        "positions of nothing",
        {"spec.evaluation.perplexity_positions": [1024]},
        "spec.evaluation.perplexity_positions",
        "add held-out rows in spec.data.eval",
    ),
    Bad(
        "positions beyond the longest row",
        {
            "spec.data.eval": [{"uri": "s3://a/b.jsonl"}],
            "spec.data.max_length": 1024,
            "spec.evaluation.perplexity_positions": [512, 1024],
        },
        "spec.evaluation.perplexity_positions",
        "raise data.max_length",
    ),
    Bad(
        "positions in disorder",
        {"spec.data.eval": [{"uri": "s3://a/b.jsonl"}], "spec.evaluation.perplexity_positions": [512, 128, 128]},
        "spec.evaluation.perplexity_positions",
        "the smallest first",
    ),
    Bad(
        "positions of pairs",
        {
            "spec.stage": "dpo",
            "spec.data.eval": [{"uri": "s3://a/b.jsonl"}],
            "spec.evaluation.perplexity_positions": [128],
        },
        "spec.evaluation.perplexity_positions",
        "finetune evaluate --perplexity-position",
    ),
    # ---- the stages
    Bad(
        "exo_pair without smoothing",
        {"spec.stage": "dpo", "spec.dpo": {"loss_type": "exo_pair"}},
        "spec.dpo.label_smoothing",
        "set it, e.g. to 0.001",
    ),
    Bad(
        "a smoothed hinge",
        {"spec.stage": "dpo", "spec.dpo": {"loss_type": "hinge", "label_smoothing": 0.1}},
        "spec.dpo.label_smoothing",
        "set loss_type: robust",
    ),
    Bad(
        "half of the preferences wrong",
        {"spec.stage": "dpo", "spec.dpo": {"label_smoothing": 0.5}},
        "spec.dpo.label_smoothing",
        "from 0 to 0.499",
        SCHEMA,
    ),
    Bad(
        "an unknown loss",
        {"spec.stage": "dpo", "spec.dpo": {"loss_type": "aot"}},
        "spec.dpo.loss_type",
        "one of sigmoid, hinge",
        SCHEMA,
        "Unsupported value",
    ),
    Bad("ppo that nobody judges", {"spec.stage": "ppo"}, "spec.ppo", "add e.g. ppo: {reward_model:"),
    Bad(
        "grpo with an empty section",
        {"spec.stage": "grpo", "spec.grpo": {}},
        "spec.grpo.reward_funcs",
        "nothing judges the answers",
    ),
    Bad(
        "answers as long as all",
        {"spec.stage": "ppo", "spec.ppo": JUDGED | {"max_completion_length": 2048}},
        "spec.ppo.max_completion_length",
        "less than spec.data.max_length",
    ),
    Bad(
        "ppo under ZeRO-3",
        {"spec.stage": "ppo", "spec.ppo": JUDGED, f"{_ZERO}.stage": 3},
        f"{_ZERO}.stage",
        "every process needs all weights for every token",
    ),
    Bad(
        "noise in what is written",
        {"spec.stage": "grpo", "spec.grpo": JUDGED, "spec.training.neftune_noise_alpha": 5},
        "spec.training.neftune_noise_alpha",
        "0 with spec.stage: grpo",
    ),
    Bad(
        "the best loss of what has none",
        {"spec.stage": "ppo", "spec.ppo": JUDGED, "spec.data.eval": [{"uri": "s3://a/b.jsonl"}]}
        | {"spec.training.load_best_model_at_end": True},
        "spec.training.metric_for_best_model",
        "set it to reward: what the model writes itself is judged",
    ),
    Bad(
        "a judge that is judged",
        {"spec.stage": "ppo", "spec.ppo": {"reward_model": {"uri": "job://tune"}}},
        "spec.ppo.reward_model.uri",
        "a job cannot wait for itself",
    ),
    Bad(
        "a reward model's file",
        {"spec.stage": "ppo", "spec.ppo": {"reward_model": {"uri": "hf://team/reward/model.safetensors"}}},
        "spec.ppo.reward_model.uri",
        "leave out what follows the name",
    ),
    Bad(
        "a reward model in no claim",
        {"spec.stage": "ppo", "spec.ppo": {"reward_model": {"uri": "pvc://No_Claim/reward"}}},
        "spec.ppo.reward_model.uri",
        "name a PersistentVolumeClaim",
    ),
    Bad(
        "a function in no claim",
        {"spec.stage": "ppo", "spec.ppo": {"reward_funcs": [{"type": "python", "uri": "pvc://No_Claim/reward.py"}]}},
        "spec.ppo.reward_funcs[0].uri",
        "name a PersistentVolumeClaim",
    ),
    Bad(
        "a format without a pattern",
        {"spec.stage": "grpo", "spec.grpo": {"reward_funcs": [{"type": "format"}]}},
        "spec.grpo.reward_funcs[0].pattern",
        "add e.g. pattern",
    ),
    Bad(
        "a function without its file",
        {"spec.stage": "grpo", "spec.grpo": {"reward_funcs": [{"type": "python"}]}},
        "spec.grpo.reward_funcs[0].uri",
        "add e.g. uri: s3://team/rewards.py",
    ),
    Bad(
        "a function in its file's name",
        {"spec.stage": "grpo", "spec.grpo": {"reward_funcs": [{"type": "python", "uri": "s3://team/rewards.py:f"}]}},
        "spec.grpo.reward_funcs[0].uri",
        "its function in function",
    ),
    Bad(
        "a length of nothing",
        {"spec.stage": "grpo", "spec.grpo": {"reward_funcs": [{"type": "length"}]}},
        "spec.grpo.reward_funcs[0].target_length",
        "add target_length",
    ),
    Bad(
        "a pattern that is none",
        {"spec.stage": "grpo", "spec.grpo": {"reward_funcs": [{"type": "format", "pattern": "(open"}]}},
        "spec.grpo.reward_funcs[0].pattern",
        "correct it",
        CONDITION,
    ),
    Bad(
        "luspo by tokens",
        {"spec.stage": "grpo", "spec.grpo": JUDGED | {"loss_type": "luspo"}},
        "spec.grpo.loss_type",
        "set importance_sampling_level: sequence",
    ),
    Bad(
        "a group of one",
        {"spec.stage": "grpo", "spec.grpo": JUDGED | {"num_generations": 1}},
        "spec.grpo.num_generations",
        "from 2 to 1024",
        SCHEMA,
        "greater than or equal to 2",
    ),
    Bad(
        "one label alone",
        {"spec.stage": "sequence_classification", "spec.sequence_classification": {"labels": ["yes"]}},
        "spec.sequence_classification.labels",
        "list all of them, or none",
    ),
    Bad(
        "one tag alone",
        {"spec.stage": "token_classification", "spec.token_classification": {"labels": ["O"]}},
        "spec.token_classification.labels",
        "list all of them, or none",
    ),
    Bad(
        "a tag named twice",
        {"spec.stage": "token_classification", "spec.token_classification": {"labels": ["O", "B-PER", "O"]}},
        "spec.token_classification.labels",
        "every label once",
        CONDITION,
    ),
    Bad(
        "labels of a number",
        {
            "spec.stage": "sequence_classification",
            "spec.sequence_classification": {"labels": ["low", "high"], "problem_type": "regression"},
        },
        "spec.sequence_classification.labels",
        "set problem_type: single_label_classification",
    ),
    Bad(
        "a chat template for words",
        {"spec.stage": "token_classification", "spec.data.chat_template": "chatml"},
        "spec.data.chat_template",
        "the rows of this stage are no conversations",
    ),
    Bad(
        "a language model that is to write targets",
        {"spec.evaluation.predict_with_generate": True, "spec.data.eval": [{"uri": "s3://a/b.jsonl"}]},
        "spec.evaluation.predict_with_generate",
        "set spec.stage: seq2seq",
    ),
    Bad(
        "targets to write for nothing",
        {"spec.stage": "seq2seq", "spec.evaluation.predict_with_generate": True, "spec.data.eval": []},
        "spec.evaluation.predict_with_generate",
        "add held-out rows",
    ),
    Bad(
        "writing for an unknown task",
        {
            "spec.stage": "seq2seq",
            "spec.method": {"type": "moelora", "tasks": ["one"]},
            "spec.evaluation.predict_with_generate": True,
            "spec.data.eval": [{"uri": "s3://a/b.jsonl"}],
        },
        "spec.evaluation.predict_with_generate",
        "would not know the task",
    ),
    Bad("beta of nothing", {"spec.stage": "kto", "spec.kto": {"beta": 0}}, "spec.kto.beta", "greater than 0", SCHEMA),
)


JUDGE = {"endpoint": "https://api.example.com/v1", "model": "judge-1"}


def _rlaif(change: dict[str, Any] | None = None, **judge: Any) -> dict[str, Any]:
    return {"spec.stage": "rlaif", "spec.rlaif": {"judge": JUDGE | judge}} | (change or {})


_AT = "spec.rlaif.judge"
_NO_TRAINING = "remove it: nothing is trained"
BAD += (
    Bad("no judge", {"spec.stage": "rlaif"}, "spec.rlaif", "add e.g. rlaif: {judge:"),
    Bad("two judges", _rlaif(uri="hf://org/judge"), f"{_AT}.endpoint", "name the base URL of an API"),
    Bad("nobody as the judge", {"spec.stage": "rlaif", "spec.rlaif": {"judge": {}}}, f"{_AT}.endpoint", "or uri"),
    Bad("an endpoint without a scheme", _rlaif(endpoint="api.example.com"), f"{_AT}.endpoint", "http:// or https://"),
    Bad("a key in the endpoint", _rlaif(endpoint="https://me:key@a.b/v1"), f"{_AT}.endpoint", "OPENAI_API_KEY"),
    Bad("no model at the endpoint", _rlaif(model=""), f"{_AT}.model", "add the name the endpoint knows"),
    Bad("a question without answers", _rlaif(prompt="Is {prompt} good? [[A]]"), f"{_AT}.prompt", "{answer_a}"),
    Bad(
        "a judge of the hub",
        _rlaif(uri="hf://a", endpoint="", model="") | {"spec.rlaif.judge.uri": "hf://a/b/c"},
        f"{_AT}.uri",
        "hf://ORG/NAME for a model",
    ),
    Bad("a claim as the judge", _rlaif(uri="pvc://Claim/x", endpoint="", model=""), f"{_AT}.uri", "CLAIM of at most"),
    Bad("itself as the judge", _rlaif(uri="job://tune", endpoint="", model=""), "spec.rlaif", "cannot wait for itself"),
    Bad("an endless request", _rlaif(timeout="2h"), f"{_AT}.timeout", "from 1s to 1h"),
    Bad(
        "one answer",
        _rlaif({"spec.rlaif": {"judge": JUDGE, "num_generations": 1}}),
        "spec.rlaif.num_generations",
        "from 2 to 64",
        SCHEMA,
    ),
    Bad("a method of nothing", _rlaif({"spec.method": {"type": "full"}}), "spec.method.type", "remove spec.method"),
    Bad("ZeRO of nothing", _rlaif({f"{_ZERO}.stage": 3}), f"{_ZERO}.stage", "remove spec.deepspeed"),
    Bad(
        "an adapter to train on by a judge",
        _rlaif({"spec.model.adapters": [{"uri": "s3://a/b", "train": True}]}),
        "spec.model.adapters",
        "adapters without train: true",
    ),
    Bad("held-out prompts", _rlaif({"spec.data.eval": [{"uri": "s3://a/b.jsonl"}]}), "spec.data.eval", "makes data"),
    Bad("prompts twice", _rlaif({"spec.data.train[0].weight": 2}), "spec.data.train", "max_prompts takes"),
    Bad("data merged", _rlaif({"spec.output.merge": True}), "spec.output.merge", "remove spec.output.merge"),
    Bad("a rank of nothing", _rlaif({"spec.method": {"r": 8}}), "spec.method.r", _NO_TRAINING, CONDITION),
    Bad(
        "a rate of nothing",
        _rlaif({"spec.training.learning_rate": 0.1}),
        "spec.training.learning_rate",
        _NO_TRAINING,
        CONDITION,
    ),
    Bad(
        "DeepSpeed of nothing", _rlaif({"spec.deepspeed.aio": {"a": 1}}), "spec.deepspeed.aio", _NO_TRAINING, CONDITION
    ),
)


def _of_other_stages() -> Iterator[Bad]:
    """Every stage's own parameters, with another stage; and what the table of stages excludes."""
    prompts = {"spec.evaluation.prompts": ["Who are you?"]}
    for name, stage in STAGES.items():
        own = {f"spec.{name}": ENOUGH[name]} if name in ENOUGH else {}
        given = {"spec.stage": name} | own
        if stage.parameters is not None:
            other = "sft" if name != "sft" else "dpo"
            at = f"spec.{name}"
            change = {at: {}} | own | {"spec.stage": other}
            yield Bad(f"{name} for {other}", change, at, f"set spec.stage: {name}")
        if not stage.packing:
            at = "spec.data.packing"
            yield Bad(f"packing with {name}", given | {at: True}, at, "leave it out: the rows of this stage")
        if not stage.generates:
            at = "spec.evaluation.prompts"
            yield Bad(f"prompts with {name}", given | prompts, at, "the model of this stage writes no text")
        for method, row in COMPATIBILITY.items():
            if name not in row.stages and name in TRAINED:
                change = given | {"spec.method": {"type": method, **ENOUGH.get(method, {})}}
                yield Bad(f"{method} with {name}", change, "spec.stage", f"with spec.method.type: {method}")


def _of_other_methods() -> Iterator[Bad]:
    """Every parameter, given to a method that does not have it."""
    shown = spec_schema()["properties"]["method"]["properties"]
    fields = {name: field for method in METHODS for name, field in method.model_fields.items() if name != "type"}
    for name, field in fields.items():
        if "type" in shown[name]:
            yield Bad(
                f"{name} for full",
                {"spec.method": {"type": "full", name: field.default}},
                f"spec.method.{name}",
                f"accepted: {name} with spec.method.type",
            )


def _of_the_table() -> Iterator[Bad]:
    """Everything that a row of the compatibility table excludes."""
    fields = {"packing": "spec.data", "gradient_checkpointing": "spec.training", "merge": "spec.output"}
    for name, row in COMPATIBILITY.items():
        method = {"type": name, **ENOUGH.get(name, {})}
        for field, section in fields.items():
            if not getattr(row, field):
                at = f"{section}.{field}"
                yield Bad(f"{field} with {name}", {"spec.method": method, at: True}, at, f"spec.method.type: {name}")
        for stage in sorted({0, 1, 2, 3} - set(row.zero_stages)):
            at = f"{_ZERO}.stage"
            yield Bad(f"ZeRO-{stage} with {name}", {"spec.method": method, at: stage}, at, f"spec.method.type: {name}")


ENOUGH: dict[str, dict[str, Any]] = {
    "trainable_tokens": {"token_indices": [1]},
    "moelora": {"tasks": ["a"]},
    "rlaif": {"judge": JUDGE},
    "ppo": JUDGED,
    "grpo": JUDGED,
}
"""What these methods and stages cannot do without."""


def _of_rollouts() -> Iterator[Bad]:
    """What is refused of one stage with rollouts, of the other one."""
    names = {"ppo": "grpo", "grpo": "ppo"}
    for bad in BAD:
        stage = bad.change.get("spec.stage")
        if stage in names and "luspo" not in bad.id and "a group of one" not in bad.id:
            other = names[stage]
            change = {key.replace(f"spec.{stage}", f"spec.{other}"): value for key, value in bad.change.items()}
            field, says = bad.field.replace(f"spec.{stage}", f"spec.{other}"), bad.says.replace(stage, other)
            yield Bad(f"{bad.id}, {other}", change | {"spec.stage": other}, field, says, bad.by, bad.server_says)


BAD += (*_of_other_methods(), *_of_the_table(), *_of_rollouts(), *_of_other_stages())
