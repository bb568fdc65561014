"""What spans several fields of a spec: one row per rule.

A row is written once and judged twice: its CEL expression by the API server at admission, its Python predicate
by ``mistakes.read`` (the operator's condition, and ``finetune run``). In both, ``self`` is the value at ``at``,
and both say the same words. What CEL cannot see (DeepSpeed's own keys, the pod template, target_modules) is in
``checks.py`` and told by the condition alone.

Rows hang as low in the schema as they can, because the API server does not judge an unchanged part of an object
again: a rule that a new version adds never makes status updates of older objects fail.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from finetune_api.base import seconds
from finetune_api.compatibility import COMPATIBILITY, CONTINUED, Row
from finetune_api.formats import formats_for
from finetune_api.schema import METHOD_PARAMETERS, spec_schema
from finetune_api.spec import CHAT_TEMPLATES
from finetune_api.stages import LANGUAGE, MAKERS, ROLLOUTS, SECTIONS, STAGES, TRAINED

NAME_LENGTH = 63 - len("-a99999") - len("-9999")
"""Pods are called ``<name>-a<attempt>-<index>``, and that is their hostname: 63 characters at most."""
NAME_ACCEPTED = f"at most {NAME_LENGTH} lower-case letters, digits and -, beginning with a letter"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One thing that must hold."""

    at: str
    """The part of the object both predicates get as ``self``: "", "spec", "spec.data.train[]" …"""
    field: str = ""
    """The field the user must change, from ``at``; empty: ``at`` itself."""
    holds: Callable[[Any], bool] | None
    """Python's predicate. None: pydantic's validation says the same."""
    cel: str
    """CEL's predicate."""
    accepted: str
    remedy: str
    problem: str = ""
    """What is wrong, where showing the value would not tell it."""


def told(rule: Rule) -> str:
    """The part of the message that does not depend on the value."""
    return f"accepted: {rule.accepted}; remedy: {rule.remedy}"


INVISIBLE = frozenset(
    name for name, node in spec_schema()["properties"]["method"]["properties"].items() if "type" not in node
)
"""Parameters of several types: no structural schema says that, so CEL cannot see them."""


def foreign_parameter(name: str) -> tuple[str, str]:
    """Accepted and remedy, for a parameter that another method has."""
    owners = [method for method, names in METHOD_PARAMETERS.items() if name in names]
    listed = " or ".join(filter(None, (", ".join(owners[:-1]), owners[-1])))
    of_lora = f" (lora calls it lora_{name})" if f"lora_{name}" in METHOD_PARAMETERS["lora"] else ""
    return (
        f"{name} with spec.method.type {listed}",
        f"remove it{of_lora}, or set spec.method.type: {listed if len(owners) < 4 else 'one of these'}",
    )


def _parameters_of_methods() -> list[Rule]:
    rules = []
    for name in dict.fromkeys(name for names in METHOD_PARAMETERS.values() for name in names):
        owners = [method for method, names in METHOD_PARAMETERS.items() if name in names]
        if name in INVISIBLE or len(owners) == len(METHOD_PARAMETERS):
            continue
        accepted, remedy = foreign_parameter(name)
        rules.append(
            Rule(
                at="spec.method",
                field=name,
                holds=None,
                cel=f"!has(self.{name}) || self.type in {owners}",
                accepted=accepted,
                remedy=remedy,
            )
        )
    return rules


def compatibility_rules(table: Mapping[str, Row], stages: tuple[str, ...]) -> list[Rule]:
    """What each method does not go with, from the table."""
    rules: list[Rule] = []

    def refuse(method: str, field: str, holds: Callable[[Any], bool], cel: str, accepted: str, remedy: str) -> None:
        rules.append(
            Rule(
                at="spec",
                field=field,
                holds=lambda self: self.method.type != method or holds(self),
                cel=f"self.method.type != '{method}' || {cel}",
                accepted=f"{accepted} with spec.method.type: {method}",
                remedy=remedy,
            )
        )

    for method, row in table.items():
        with_zero3 = " or ".join(name for name, other in table.items() if 3 in other.zero_stages)
        if set(row.stages) != set(stages):
            wanted = (*row.stages, *MAKERS)  # that those go with no method, another rule says
            refuse(
                method,
                "stage",
                lambda self, wanted=wanted: self.stage in wanted,  # type: ignore[misc]
                f"self.stage in {list(wanted)}",
                "one of " + ", ".join(row.stages),
                "choose one of them, or another spec.method.type",
            )
        if set(row.zero_stages) != {0, 1, 2, 3}:
            partitions = (None, *row.zero_stages)
            refuse(
                method,
                "deepspeed.zero_optimization.stage",
                lambda self, wanted=partitions: self.deepspeed.zero_optimization.stage in wanted,  # type: ignore[misc]
                "!has(self.deepspeed.zero_optimization.stage) || "
                f"self.deepspeed.zero_optimization.stage in {list(row.zero_stages)}",
                "one of " + ", ".join(map(str, row.zero_stages)),
                "choose one of them, or leave it out: the plan chooses "
                f"{row.default_zero_stage}; ZeRO-3 goes with {with_zero3}",
            )
        for allowed, field in (
            (row.packing, "data.packing"),
            (row.gradient_checkpointing, "training.gradient_checkpointing"),
            (row.merge, "output.merge"),
        ):
            if not allowed:
                section, _, key = field.partition(".")
                refuse(
                    method,
                    field,
                    lambda self, section=section, key=key: not getattr(getattr(self, section), key),  # type: ignore[misc]
                    f"!self.{field}",
                    "false",
                    _WITHOUT_MERGE[row.whole_model]
                    if key == "merge"
                    else "leave it out, or choose another spec.method.type",
                )
    return rules


def _parameters_of_stages() -> list[Rule]:
    """``spec.<stage>`` goes with that stage only."""
    return [
        Rule(
            at="spec",
            field=section,
            holds=lambda self, section=section: self.stage == section or getattr(self, section) is None,  # type: ignore[misc]
            cel=f"!has(self.{section}) || self.stage == '{section}'",
            problem="it is there although spec.stage is another one",
            accepted=f"{section} with spec.stage: {section}",
            remedy=f"remove it, or set spec.stage: {section}",
        )
        for section in SECTIONS
    ]


def _what_stages_exclude() -> list[Rule]:
    packed = tuple(name for name, stage in STAGES.items() if stage.packing)
    writing = tuple(name for name, stage in STAGES.items() if stage.generates)
    return [
        Rule(
            at="spec",
            field="data.packing",
            holds=lambda self: not self.data.packing or self.stage in packed,
            cel=f"!self.data.packing || self.stage in {list(packed)}",
            accepted=f"false but with spec.stage {' or '.join(packed)}",
            remedy="leave it out: the rows of this stage are not single texts",
        ),
        Rule(
            at="spec",
            field="evaluation.prompts",
            holds=lambda self: not self.evaluation.prompts or self.stage in writing,
            cel=f"size(self.evaluation.prompts) == 0 || self.stage in {list(writing)}",
            problem="there are questions, but the model of this stage writes no text, or is not trained",
            accepted=f"none but with spec.stage {', '.join(writing)}",
            remedy="remove them; name held-out rows in spec.data.eval",
        ),
    ]


def _where_nothing_is_trained() -> list[Rule]:
    """What stages that make data have no use for. Parameters beside these are in ``checks.py``."""
    adapters = "!self.model.adapters.exists(a, a.train)"
    partitioned = "!has(self.deepspeed.zero_optimization.stage)"
    rows: list[tuple[str, Callable[[Any], bool], str, str, str]] = [
        (
            "method.type",
            lambda self: self.method.type == "lora",
            "self.method.type == 'lora'",
            "nothing",
            "spec.method",
        ),
        (
            "deepspeed.zero_optimization.stage",
            lambda self: self.deepspeed.zero_optimization.stage is None,
            partitioned,
            "nothing",
            "spec.deepspeed",
        ),
        (
            "model.adapters",
            lambda self: not any(a.train for a in self.model.adapters),
            adapters,
            "adapters without train: true",
            "train: true",
        ),
        ("data.eval", lambda self: not self.data.eval, "size(self.data.eval) == 0", "nothing", "spec.data.eval"),
        (
            "data.train",
            lambda self: all(source.weight == 1 for source in self.data.train),
            "self.data.train.all(s, s.weight == 1.0)",
            "sources without weight: every prompt is taken once",
            "weight; max_prompts takes a random choice of all prompts",
        ),
        ("output.merge", lambda self: not self.output.merge, "!self.output.merge", "false", "spec.output.merge"),
    ]
    return [
        Rule(
            at="spec",
            field=field,
            holds=lambda self, holds=holds: self.stage not in MAKERS or holds(self),  # type: ignore[misc]
            cel=f"!(self.stage in {list(MAKERS)}) || {cel}",
            problem="this stage trains nothing and makes data",
            accepted=f"{accepted} with spec.stage {' or '.join(MAKERS)}",
            remedy=f"remove {what}",
        )
        for field, holds, cel, accepted, what in rows
    ]


def _judge_rules() -> list[Rule]:
    at = "spec.rlaif.judge"
    return [
        Rule(
            at="spec",
            field="rlaif",
            holds=lambda self: self.stage != "rlaif" or self.rlaif is not None,
            cel="self.stage != 'rlaif' || has(self.rlaif)",
            problem="nobody is named to compare the answers",
            accepted="rlaif.judge with spec.stage: rlaif",
            remedy="add e.g. rlaif: {judge: {endpoint: https://api.openai.com/v1, model: NAME}}",
        ),
        Rule(
            at=at,
            field="endpoint",
            holds=lambda self: (self.endpoint != "") != (self.uri is not None),
            cel="(self.endpoint != '') != has(self.uri)",
            problem="the judge is not one model: endpoint and uri are both set, or none of them",
            accepted="endpoint (with model), or uri",
            remedy="name the base URL of an API in endpoint, or a model to load in uri",
        ),
        Rule(
            at=at,
            field="endpoint",
            holds=lambda self: self.endpoint == "" or re.search(_ENDPOINT, self.endpoint) is not None,
            cel=f"self.endpoint == '' || self.endpoint.matches(r'{_ENDPOINT}')",
            accepted="http:// or https://, a host, and a path such as /v1",
            remedy="leave out chat/completions, user names and what follows a ?; the key comes from OPENAI_API_KEY",
        ),
        Rule(
            at=at,
            field="model",
            holds=lambda self: (self.endpoint != "") == (self.model != ""),
            cel="(self.endpoint != '') == (self.model != '')",
            accepted="the name of a model at the endpoint; nothing with uri",
            remedy="add the name the endpoint knows the model by, or remove it beside uri",
        ),
        Rule(
            at=at,
            field="prompt",
            holds=lambda self: (
                not self.prompt
                or all(part in self.prompt for part in ("{prompt}", "{answer_a}", "{answer_b}", "[[A]]"))
            ),
            cel="self.prompt == '' || self.prompt.contains('{prompt}') && self.prompt.contains('{answer_a}') && "
            "self.prompt.contains('{answer_b}') && self.prompt.contains('[[A]]')",
            problem="a part of the question is missing",
            accepted="a text with {prompt}, {answer_a} and {answer_b} that asks for [[A]], [[B]] or [[C]]",
            remedy="add what is missing, or leave it out for the built-in question and set criteria",
        ),
        Rule(
            at=at,
            field="uri",
            holds=lambda self: (
                self.uri is None or not self.uri.startswith("hf://") or re.search(_HF_MODEL, self.uri) is not None
            ),
            cel=f"!has(self.uri) || !self.uri.startsWith('hf://') || self.uri.matches(r'{_HF_MODEL}')",
            accepted="hf://ORG/NAME for a model of the hub",
            remedy="leave out what follows the name; a branch or commit goes into revision",
        ),
        _claim(at, optional=True),
        Rule(
            at=at,
            field="timeout",
            holds=lambda self: 1 <= seconds(self.timeout) <= 3600,
            cel="duration(self.timeout) >= duration('1s') && duration(self.timeout) <= duration('1h')",
            accepted="from 1s to 1h",
            remedy="choose a length of time in that range",
        ),
    ]


def _of_stages_with_targets() -> list[Rule]:
    """sequence_classification, token_classification, seq2seq."""
    silent = tuple(name for name, stage in STAGES.items() if stage.record in ("Labelled", "Tagged", "SourceTarget"))
    labels = [
        Rule(
            at=f"spec.{section}",
            field="labels",
            holds=lambda self: len(self.labels) != 1,
            cel="size(self.labels) != 1",
            accepted="two labels at least",
            remedy="list all of them, or none: they are then found in the training rows",
        )
        for section in ("sequence_classification", "token_classification")
    ]
    return [
        *labels,
        Rule(
            at="spec.sequence_classification",
            field="labels",
            holds=lambda self: not self.labels or self.problem_type != "regression",
            cel="size(self.labels) == 0 || self.problem_type != 'regression'",
            problem="a regression has no labels",
            accepted="none with problem_type: regression",
            remedy="remove them, or set problem_type: single_label_classification",
        ),
        Rule(
            at="spec",
            field="data.chat_template",
            holds=lambda self: self.data.chat_template == "" or self.stage not in silent,
            cel=f"self.data.chat_template == '' || !(self.stage in {list(silent)})",
            problem="there is a chat template, but the rows of this stage are no conversations",
            accepted=f"none with spec.stage {', '.join(silent)}",
            remedy="remove it; seq2seq.source_prefix is put before sources",
        ),
        Rule(
            at="spec",
            field="evaluation.predict_with_generate",
            holds=lambda self: not self.evaluation.predict_with_generate or self.stage == "seq2seq",
            cel="!self.evaluation.predict_with_generate || self.stage == 'seq2seq'",
            accepted="false but with spec.stage: seq2seq",
            remedy="remove it, or set spec.stage: seq2seq; evaluation.prompts shows what other models write",
        ),
        Rule(
            at="spec",
            field="evaluation.predict_with_generate",
            holds=lambda self: not self.evaluation.predict_with_generate or self.method.type != "moelora",
            cel="!self.evaluation.predict_with_generate || self.method.type != 'moelora'",
            accepted="false with spec.method.type: moelora",
            remedy="remove it: while writing, the model would not know the task of the row",
        ),
        _held_out("evaluation", "predict_with_generate", "false", "!{}", "it"),
    ]


def _held_out(section: str, field: str, nothing: str, unset: str, what: str = "") -> Rule:
    """What an evaluation is asked for needs rows for it. ``unset``: CEL, true of the field where nothing is asked."""

    def holds(self: Any) -> bool:
        return not getattr(getattr(self, section), field) or len(self.data.eval) > 0

    return Rule(
        at="spec",
        field=f"{section}.{field}",
        holds=holds,
        cel=f"{unset.format(f'self.{section}.{field}')} || size(self.data.eval) > 0",
        accepted=f"{nothing}, as spec.data.eval is empty",
        remedy=f"add held-out rows in spec.data.eval, or remove {what or field}",
    )


_ENDPOINT = r"^https?://[^/?#@ ]+(/[^?# ]*)?$"
_SMOOTHED = ("sigmoid", "robust", "exo_pair")
"""The losses of dpo that know label_smoothing."""

_WITHOUT_MERGE = {
    True: "leave it out: the output is a whole model already",
    False: "leave it out: what this method adds is no part of any weight; it is loaded beside the model",
}

_CLAIM = r"^pvc://[a-z0-9]([-a-z0-9]{0,55}[a-z0-9])?(/.*)?$"


def _claim(at: str, field: str = "uri", optional: bool = False) -> Rule:
    def holds(self: Any) -> bool:
        uri = getattr(self, field)
        return not (uri or "").startswith("pvc://") or re.search(_CLAIM, uri) is not None

    return Rule(
        at=at,
        field=field,
        holds=holds,
        cel=(f"!has(self.{field}) || " if optional else "")
        + f"!self.{field}.startsWith('pvc://') || self.{field}.matches(r'{_CLAIM}')",
        accepted="pvc://CLAIM/PATH, CLAIM of at most 57 lower-case letters, digits and -",
        remedy="name a PersistentVolumeClaim of the job's namespace",
    )


_OTHER_FORMATS = r"\.(xlsx?|ods|ya?ml|zip|tar|tgz|7z|rar|tar\.(gz|bz2|xz|zst)|(parquet|arrow)\.(gz|bz2|xz|zst))$"


def _source_rules(at: str) -> list[Rule]:
    """For every source of rows."""
    return [
        Rule(
            at=at,
            field="uri",
            holds=lambda self: (
                not self.uri.startswith("hf://")
                or re.search(r"^hf://datasets/[^/@]+/[^/@]+(/.+)?$", self.uri) is not None
            ),
            cel="!self.uri.startsWith('hf://') || self.uri.matches(r'^hf://datasets/[^/@]+/[^/@]+(/.+)?$')",
            accepted="hf://datasets/ORG/NAME for a data set of the hub",
            remedy="write datasets/ after hf://; a branch or commit goes into revision, a split into split",
        ),
        Rule(
            at=at,
            field="uri",
            holds=lambda self: re.search(_OTHER_FORMATS, self.uri) is None,
            cel=f"!self.uri.matches(r'{_OTHER_FORMATS}')",
            accepted="a file that ends in .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow, or a folder of such",
            remedy="unpack archives, save tables as .csv; .parquet and .arrow are compressed inside",
        ),
        Rule(
            at=at,
            field="uri",
            holds=lambda self: not self.uri.startswith("job://") or len(self.uri) <= len("job://") + NAME_LENGTH,
            cel=f"!self.uri.startsWith('job://') || size(self.uri) <= {len('job://') + NAME_LENGTH}",
            accepted=f"job://NAME with a name of at most {NAME_LENGTH} characters",
            remedy="name an existing FineTuneJob: none can have such a name",
        ),
        _claim(at),
        *(
            Rule(
                at=at,
                field=field,
                holds=lambda self, field=field, default=default: (  # type: ignore[misc]
                    self.uri.startswith("hf://") or getattr(self, field) == default
                ),
                cel=f"self.uri.startsWith('hf://') || self.{field} == '{default}'",
                accepted=f"{default}, as uri is not hf://",
                remedy=f"remove {field}; files elsewhere have no such thing",
            )
            for field, default in (("revision", "main"), ("split", "train"))
        ),
    ]


def _format_of_stage(field: str) -> Rule:
    """A format whose records the stage cannot learn from; of auto, the trainer tells."""
    allowed = {stage: formats_for(stage) for stage in STAGES}
    return Rule(
        at="spec",
        field=f"data.{field}",
        holds=lambda self: all(source.format in allowed[self.stage] for source in getattr(self.data, field)),
        cel=f"self.data.{field}.all(s, s.format in {allowed}[self.stage])",
        problem="a source's format gives nothing that spec.stage learns from",
        accepted="formats of the stage (docs/data.md lists them)",
        remedy="choose another format or another spec.stage; auto takes what fits",
    )


def _distinct(at: str) -> Rule:
    return Rule(
        at=at,
        holds=lambda self: len({(s.uri, s.split, s.revision) for s in self}) == len(self),
        cel="self.all(a, self.exists_one(b, b.uri == a.uri && b.split == a.split && b.revision == a.revision))",
        problem="the same source is named more than once",
        accepted="every source once",
        remedy="remove the repetition"
        + ("; to see its rows more often, set its weight" if at.endswith("train") else ""),
    )


_OF_WHAT_IS_WRITTEN = "^(eval_)?(reward|reward_.+|ended|length)(/.+)?$"


def _rollouts(stage: str) -> list[Rule]:
    """Of a stage that learns from what the model writes."""
    model, functions = f"spec.{stage}.reward_model", f"spec.{stage}.reward_funcs[]"

    def given(self: Any, field: str, kind: str) -> bool:
        return self.type != kind or bool(getattr(self, field))

    return [
        Rule(
            at="spec",
            field=stage,
            holds=lambda self: self.stage != stage or getattr(self, stage) is not None,
            cel=f"self.stage != '{stage}' || has(self.{stage})",
            problem=f"it is missing, and stage {stage} does not know what a good answer is",
            accepted="reward_model, reward_funcs or both",
            remedy=f"add e.g. {stage}: {{reward_model: {{uri: job://NAME}}}} with the name of a job of stage reward",
        ),
        Rule(
            at=f"spec.{stage}",
            field="reward_funcs",
            holds=lambda self: self.reward_model is not None or len(self.reward_funcs) > 0,
            cel="has(self.reward_model) || size(self.reward_funcs) > 0",
            problem="nothing judges the answers",
            accepted="reward_model, reward_funcs or both",
            remedy="add reward_model: {uri: job://NAME} with the name of a job of stage reward, or a reward function",
        ),
        Rule(
            at="spec",
            field=f"{stage}.max_completion_length",
            holds=lambda self: (
                getattr(self, stage) is None or getattr(self, stage).max_completion_length < self.data.max_length
            ),
            cel=f"!has(self.{stage}) || self.{stage}.max_completion_length < self.data.max_length",
            accepted="less than spec.data.max_length, which holds prompt and answer",
            remedy="lower it, or raise spec.data.max_length",
        ),
        Rule(
            at="spec",
            field="deepspeed.zero_optimization.stage",
            holds=lambda self: self.stage != stage or self.deepspeed.zero_optimization.stage != 3,
            cel=f"self.stage != '{stage}' || !has(self.deepspeed.zero_optimization.stage) || "
            "self.deepspeed.zero_optimization.stage != 3",
            accepted=f"0, 1 or 2 with spec.stage: {stage}",
            remedy="choose one of them: to write an answer, every process needs all weights for every token; "
            "method.type: qlora holds a large model in a quarter of the memory",
        ),
        Rule(
            at="spec",
            field="training.neftune_noise_alpha",
            holds=lambda self: self.stage != stage or self.training.neftune_noise_alpha == 0,
            cel=f"self.stage != '{stage}' || self.training.neftune_noise_alpha == 0.0",
            accepted=f"0 with spec.stage: {stage}",
            remedy="leave it out: the probabilities of an answer must be those it was written with",
        ),
        Rule(
            at="spec",
            field="training.metric_for_best_model",
            holds=lambda self: (
                self.stage != stage
                or not (self.training.load_best_model_at_end or self.training.early_stopping_patience)
                or re.match(_OF_WHAT_IS_WRITTEN, self.training.metric_for_best_model) is not None
            ),
            cel=f"self.stage != '{stage}' || "
            "!(self.training.load_best_model_at_end || self.training.early_stopping_patience > 0) || "
            f"self.training.metric_for_best_model.matches('{_OF_WHAT_IS_WRITTEN}')",
            accepted=f"reward, reward_FUNCTION, ended or length, also of one source (reward/NAME), with stage {stage}",
            remedy="set it to reward: what the model writes itself is judged, and has no loss",
        ),
        Rule(
            at="",
            field=f"{model}.uri",
            holds=lambda self: (
                getattr(self.spec, stage) is None
                or getattr(self.spec, stage).reward_model is None
                or getattr(self.spec, stage).reward_model.uri != f"job://{self.metadata.name}"
            ),
            cel=f"!has(self.spec.{stage}) || !has(self.spec.{stage}.reward_model) || "
            f"self.{model}.uri != 'job://' + self.metadata.name",
            accepted="the name of another FineTuneJob",
            remedy="name the job that makes the reward model; a job cannot wait for itself",
        ),
        Rule(
            at=model,
            field="uri",
            holds=lambda self: not self.uri.startswith("hf://") or re.search(_HF_MODEL, self.uri) is not None,
            cel=f"!self.uri.startsWith('hf://') || self.uri.matches(r'{_HF_MODEL}')",
            accepted="hf://ORG/NAME for a model of the hub",
            remedy="leave out what follows the name; a branch or commit goes into revision",
        ),
        _claim(model),
        _claim(functions, optional=True),
        *(
            Rule(
                at=functions,
                field=field,
                holds=lambda self, field=field, kind=kind: given(self, field, kind),  # type: ignore[misc]
                cel=f"self.type != '{kind}' || {cel}",
                problem="it is missing",
                accepted=f"{accepted} with type: {kind}",
                remedy=remedy,
            )
            for kind, field, cel, accepted, remedy in (
                (
                    "format",
                    "pattern",
                    "self.pattern != ''",
                    "a regular expression",
                    r"add e.g. pattern: '<answer>.*</answer>'",
                ),
                ("length", "target_length", "self.target_length > 0", "tokens, at least 1", "add target_length"),
                ("python", "uri", "has(self.uri)", "a file", "add e.g. uri: s3://team/rewards.py"),
            )
        ),
        Rule(
            at=functions,
            field="uri",
            holds=lambda self: self.uri is None or self.uri.endswith(".py"),
            cel="!has(self.uri) || self.uri.endsWith('.py')",
            accepted="a file that ends in .py",
            remedy="name the file in uri and its function in function",
        ),
    ]


def _at_least(field: str, attribute: str, low: str) -> Rule:
    high = "168h"
    return Rule(
        at="spec.recovery",
        field=field,
        holds=lambda self: seconds(low) <= seconds(getattr(self, attribute)) <= seconds(high),
        cel=f"duration(self.{field}) >= duration('{low}') && duration(self.{field}) <= duration('{high}')",
        accepted=f"from {low} to {high}",
        remedy="choose a length of time in that range",
    )


_UNCHANGED_BASE = ("default", "gaussian", "orthogonal")
"""The values of init_lora_weights that leave the model's weights alone."""
_HF_MODEL = r"^hf://[A-Za-z0-9][-A-Za-z0-9_.]*(/[A-Za-z0-9][-A-Za-z0-9_.]*)?$"
_GGUF_FILE = r"^[^/]*\.gguf$"
_LABEL = r"^[a-z]([-a-z0-9]*[a-z0-9])?$"

RULES: tuple[Rule, ...] = (
    # ---- the whole object
    Rule(
        at="",
        field="metadata.name",
        holds=lambda self: re.search(_LABEL, self.metadata.name) is not None and len(self.metadata.name) <= NAME_LENGTH,
        cel=f"self.metadata.name.matches(r'{_LABEL}') && size(self.metadata.name) <= {NAME_LENGTH}",
        accepted=NAME_ACCEPTED,
        remedy="choose another name: the host names of the pods are made of it",
    ),
    Rule(
        at="",
        field="spec.model.uri",
        holds=lambda self: self.spec.model.uri != f"job://{self.metadata.name}",
        cel="self.spec.model.uri != 'job://' + self.metadata.name",
        accepted="the name of another FineTuneJob",
        remedy="name the job whose output this one starts from; a job cannot wait for itself",
    ),
    # ---- the model
    Rule(
        at="spec.model",
        field="uri",
        holds=lambda self: not self.uri.startswith("hf://") or re.search(_HF_MODEL, self.uri) is not None,
        cel=f"!self.uri.startsWith('hf://') || self.uri.matches(r'{_HF_MODEL}')",
        accepted="hf://ORG/NAME for a model of the hub",
        remedy="leave out what follows the name; a branch or commit goes into revision, a file into gguf_file",
    ),
    Rule(
        at="spec.model",
        field="uri",
        holds=lambda self: not self.uri.endswith(".gguf"),
        cel="!self.uri.endsWith('.gguf')",
        accepted="the folder of the model",
        remedy="name the folder in uri and the file in gguf_file",
    ),
    Rule(
        at="spec.model",
        field="uri",
        holds=lambda self: not self.uri.startswith("job://") or len(self.uri) <= len("job://") + NAME_LENGTH,
        cel=f"!self.uri.startsWith('job://') || size(self.uri) <= {len('job://') + NAME_LENGTH}",
        accepted=f"job://NAME with a name of at most {NAME_LENGTH} characters",
        remedy="name an existing FineTuneJob: none can have such a name",
    ),
    _claim("spec.model"),
    Rule(
        at="spec.model",
        field="revision",
        holds=lambda self: self.uri.startswith("hf://") or self.revision == "main",
        cel="self.uri.startsWith('hf://') || self.revision == 'main'",
        accepted="main, as uri is not hf://",
        remedy="remove revision; only the hub has branches, tags and commits",
    ),
    Rule(
        at="spec.model",
        field="gguf_file",
        holds=lambda self: not self.gguf_file or re.search(_GGUF_FILE, self.gguf_file) is not None,
        cel=f"self.gguf_file == '' || self.gguf_file.matches(r'{_GGUF_FILE}')",
        accepted="the name of a file in uri that ends in .gguf, without a path",
        remedy="name the folder in uri and only the file here",
    ),
    Rule(
        at="spec.model",
        field="gguf_file",
        holds=lambda self: not self.gguf_file or not self.uri.startswith("job://"),
        cel="self.gguf_file == '' || !self.uri.startsWith('job://')",
        accepted="nothing, as uri is job://",
        remedy="remove gguf_file: the output of a FineTuneJob is safetensors",
    ),
    Rule(
        at="",
        field="spec.data",
        holds=lambda self: all(
            s.uri != f"job://{self.metadata.name}" for s in (*self.spec.data.train, *self.spec.data.eval)
        ),
        # Not s.uri != 'job://' + …: joined for every source it would exceed the API server's budget.
        cel="!(('job://' + self.metadata.name) in self.spec.data.train.map(s, s.uri)) && "
        "!(('job://' + self.metadata.name) in self.spec.data.eval.map(s, s.uri))",
        problem="one of its sources is the output of this job",
        accepted="the names of other FineTuneJobs",
        remedy="name the job whose rows this one learns from; a job cannot wait for itself",
    ),
    Rule(
        at="",
        field="spec.rlaif",
        holds=lambda self: self.spec.rlaif is None or self.spec.rlaif.judge.uri != f"job://{self.metadata.name}",
        cel="!has(self.spec.rlaif) || !has(self.spec.rlaif.judge.uri) || "
        "self.spec.rlaif.judge.uri != 'job://' + self.metadata.name",
        problem="its judge is the output of this job",
        accepted="the name of another FineTuneJob",
        remedy="name the job whose model judges; a job cannot wait for itself",
    ),
    # ---- adapters made earlier
    Rule(
        at="",
        field="spec.model.adapters",
        holds=lambda self: all(a.uri != f"job://{self.metadata.name}" for a in self.spec.model.adapters),
        cel="self.spec.model.adapters.all(a, a.uri != 'job://' + self.metadata.name)",
        problem="one of them is the output of this job",
        accepted="the names of other FineTuneJobs",
        remedy="name the job whose adapter this one starts from; a job cannot wait for itself",
    ),
    Rule(
        at="spec.model.adapters[]",
        field="uri",
        holds=lambda self: not self.uri.startswith("hf://") or re.search(_HF_MODEL, self.uri) is not None,
        cel=f"!self.uri.startsWith('hf://') || self.uri.matches(r'{_HF_MODEL}')",
        accepted="hf://ORG/NAME for an adapter of the hub",
        remedy="leave out what follows the name; a branch or commit goes into revision",
    ),
    Rule(
        at="spec.model",
        field="adapters",
        holds=lambda self: not any(a.train for a in self.adapters[:-1]),
        cel="size(self.adapters.filter(a, a.train)) == 0 || "
        "size(self.adapters.filter(a, a.train)) == 1 && self.adapters[size(self.adapters) - 1].train",
        problem="another one than the last has train: true",
        accepted="train: true for the last one only",
        remedy="put the adapter to train on at the end; those before it stay as they are",
    ),
    Rule(
        at="spec.model",
        field="adapters",
        holds=lambda self: all(a.uri != self.uri for a in self.adapters),
        cel="self.adapters.all(a, a.uri != self.uri)",
        problem="one of them is the model itself",
        accepted="other folders than uri",
        remedy="name the base in uri, and its adapters here",
    ),
    Rule(
        at="spec.model",
        field="adapters",
        holds=lambda self: not self.gguf_file or all(a.train for a in self.adapters),
        cel="self.gguf_file == '' || self.adapters.all(a, a.train)",
        problem="adapters are not merged into a GGUF file",
        accepted="at most one, with train: true, beside gguf_file",
        remedy="make a model of them first (finetune merge), or name the model the file was made of",
    ),
    Rule(
        at="spec",
        field="model.adapters",
        holds=lambda self: self.method.type in CONTINUED or not any(a.train for a in self.model.adapters),
        cel=f"self.method.type in {list(CONTINUED)} || !self.model.adapters.exists(a, a.train)",
        problem="adapters of this method are not trained on",
        accepted="train: true with spec.method.type " + ", ".join(CONTINUED),
        remedy="remove train: true; the adapter then stays as it is, and a new one is learned on top of it",
    ),
    Rule(
        at="spec",
        field="model.adapters",
        holds=lambda self: self.deepspeed.zero_optimization.stage != 3 or not any(a.train for a in self.model.adapters),
        cel="!has(self.deepspeed.zero_optimization.stage) || self.deepspeed.zero_optimization.stage != 3 || "
        "!self.model.adapters.exists(a, a.train)",
        problem="an adapter is not trained on under ZeRO-3",
        accepted="train: true with spec.deepspeed.zero_optimization.stage 0, 1 or 2",
        remedy="choose a lower stage, or remove train: true to learn a new adapter on top of it",
    ),
    Rule(
        at="spec.model",
        field="rope_parameters.factor",
        holds=lambda self: (self.rope_parameters.rope_type == "default") == (self.rope_parameters.factor == 1),
        cel="(self.rope_parameters.rope_type == 'default') == (self.rope_parameters.factor == 1.0)",
        accepted="a factor above 1 with rope_type linear, dynamic, yarn or llama3, and none with default",
        remedy="set both, e.g. {rope_type: yarn, factor: 4}, or neither",
    ),
    # ---- the method
    *_parameters_of_methods(),
    Rule(
        at="spec.method",
        field="target_r",
        holds=lambda self: self.type != "adalora" or self.target_r < self.init_r,
        cel="self.type != 'adalora' || (has(self.target_r) ? self.target_r : 8) < "
        "(has(self.init_r) ? self.init_r : 12)",
        problem="target_r (8 where it is not set) is not less than init_r (12 where it is not set)",
        accepted="target_r less than init_r",
        remedy="lower target_r, or raise init_r: AdaLoRA takes ranks away; lora keeps them",
    ),
    Rule(
        at="spec.method",
        field="prompt_tuning_init_text",
        holds=lambda self: (
            self.type != "prompt_tuning" or (self.prompt_tuning_init == "TEXT") == (self.prompt_tuning_init_text != "")
        ),
        cel="self.type != 'prompt_tuning' || (has(self.prompt_tuning_init) && self.prompt_tuning_init == 'TEXT') == "
        "(has(self.prompt_tuning_init_text) && self.prompt_tuning_init_text != '')",
        problem="prompt_tuning_init and prompt_tuning_init_text do not fit",
        accepted="a text with prompt_tuning_init: TEXT, and none without",
        remedy="write both, or neither",
    ),
    Rule(
        at="spec.method",
        field="token_indices",
        holds=lambda self: self.type != "trainable_tokens" or len(self.token_indices) > 0,
        cel="self.type != 'trainable_tokens' || (has(self.token_indices) && size(self.token_indices) > 0)",
        problem="no token is named",
        accepted="the numbers of the tokens to train",
        remedy="add them, e.g. [128002, 128003]; tokenizer.convert_tokens_to_ids tells them",
    ),
    Rule(
        at="spec.method",
        field="init_lora_weights",
        holds=lambda self: self.type != "qlora" or self.init_lora_weights in _UNCHANGED_BASE,
        cel="self.type != 'qlora' || !has(self.init_lora_weights) || "
        f"self.init_lora_weights in {list(_UNCHANGED_BASE)}",
        accepted=", ".join(_UNCHANGED_BASE) + " with spec.method.type: qlora",
        remedy="leave it out, or set spec.method.type: lora: the others change weights, and those in 4 bits are fixed",
    ),
    Rule(
        at="spec",
        field="method.init_lora_weights",
        holds=lambda self: (
            self.method.type != "lora"
            or self.method.init_lora_weights in _UNCHANGED_BASE
            or self.deepspeed.zero_optimization.stage != 3
        ),
        cel="self.method.type != 'lora' || !has(self.method.init_lora_weights) || "
        f"self.method.init_lora_weights in {list(_UNCHANGED_BASE)} || "
        "!has(self.deepspeed.zero_optimization.stage) || self.deepspeed.zero_optimization.stage != 3",
        accepted=", ".join(_UNCHANGED_BASE) + " with spec.deepspeed.zero_optimization.stage: 3",
        remedy="leave it out, or choose a lower stage: the others decompose whole weights, which ZeRO-3 has cut up",
    ),
    Rule(
        at="spec.method",
        field="tasks",
        holds=lambda self: self.type != "moelora" or len(set(self.tasks)) == len(self.tasks) > 0,
        cel="self.type != 'moelora' || has(self.tasks) && size(self.tasks) > 0 && "
        "self.tasks.all(a, self.tasks.exists_one(b, b == a))",
        problem="the tasks are not named, or one is named twice",
        accepted="every task of the rows once with spec.method.type: moelora",
        remedy="list the names that the rows have in their field task",
    ),
    Rule(
        at="spec.method",
        field="num_experts",
        holds=lambda self: self.type != "moelora" or self.r % self.num_experts == 0,
        cel="self.type != 'moelora' || "
        "(has(self.r) ? self.r : 16) % (has(self.num_experts) ? self.num_experts : 8) == 0",
        problem="num_experts (8 where it is not set) does not divide r (16 where it is not set)",
        accepted="a divisor of r",
        remedy="choose both so that every expert has a whole rank, r / num_experts",
    ),
    *compatibility_rules(COMPATIBILITY, TRAINED),
    # ---- the stage
    *_parameters_of_stages(),
    *_what_stages_exclude(),
    *(rule for stage in ROLLOUTS for rule in _rollouts(stage)),
    Rule(
        at="spec.grpo",
        field="loss_type",
        holds=lambda self: self.loss_type != "luspo" or self.importance_sampling_level == "sequence",
        cel="self.loss_type != 'luspo' || self.importance_sampling_level == 'sequence'",
        accepted="other than luspo with importance_sampling_level: token",
        remedy="set importance_sampling_level: sequence, of which luspo is a kind",
    ),
    *_of_stages_with_targets(),
    Rule(
        at="spec.dpo",
        field="label_smoothing",
        holds=lambda self: self.loss_type != "exo_pair" or self.label_smoothing > 0,
        cel="self.loss_type != 'exo_pair' || self.label_smoothing > 0.0",
        accepted="greater than 0 with loss_type: exo_pair",
        remedy="set it, e.g. to 0.001 as its paper does",
    ),
    Rule(
        at="spec.dpo",
        field="label_smoothing",
        holds=lambda self: self.loss_type in _SMOOTHED or self.label_smoothing == 0,
        cel=f"self.loss_type in {list(_SMOOTHED)} || self.label_smoothing == 0.0",
        accepted=f"0 but with loss_type {' or '.join(_SMOOTHED)}",
        remedy="leave it out, or set loss_type: robust",
    ),
    *_judge_rules(),
    *_where_nothing_is_trained(),
    # ---- the data
    *_source_rules("spec.data.train[]"),
    *_source_rules("spec.data.eval[]"),
    Rule(
        at="spec.data.eval[]",
        field="weight",
        holds=lambda self: self.weight == 1,
        cel="self.weight == 1.0",
        accepted="1: every held-out row is evaluated once",
        remedy="remove weight; it is for training rows only",
    ),
    _format_of_stage("train"),
    _format_of_stage("eval"),
    _distinct("spec.data.train"),
    _distinct("spec.data.eval"),
    Rule(
        at="spec.data",
        field="chat_template",
        holds=lambda self: self.chat_template in ("", *CHAT_TEMPLATES) or "messages" in self.chat_template,
        cel=f"self.chat_template in {['', *CHAT_TEMPLATES]} || self.chat_template.contains('messages')",
        accepted=", ".join(CHAT_TEMPLATES) + "; or a Jinja template that renders the variable messages",
        remedy="choose a name, paste the template's text (not its path), or leave it out for the tokenizer's own",
    ),
    # ---- the optimisation
    Rule(
        at="spec.training",
        field="max_steps",
        holds=lambda self: self.max_steps != 0,
        cel="self.max_steps != 0",
        accepted="-1, or at least 1",
        remedy="leave it out to train num_train_epochs epochs",
    ),
    Rule(
        at="spec.training",
        field="warmup_steps",
        holds=lambda self: self.warmup_steps < 1 or float(self.warmup_steps).is_integer(),
        cel="self.warmup_steps < 1.0 || double(int(self.warmup_steps)) == self.warmup_steps",
        accepted="a share of all steps below 1, or a whole number of steps",
        remedy="round it",
    ),
    Rule(
        at="spec.training",
        field="warmup_steps",
        holds=lambda self: self.max_steps <= 0 or self.warmup_steps <= self.max_steps,
        cel="self.max_steps <= 0 || self.warmup_steps <= double(self.max_steps)",
        accepted="at most max_steps",
        remedy="lower it, e.g. to 0.03 (3 % of all steps), or raise max_steps",
    ),
    Rule(
        at="spec.training",
        field="warmup_steps",
        holds=lambda self: self.lr_scheduler_type != "constant" or self.warmup_steps == 0,
        cel="self.lr_scheduler_type != 'constant' || self.warmup_steps == 0.0",
        accepted="0 with lr_scheduler_type: constant, which has no warm-up",
        remedy="set lr_scheduler_type: constant_with_warmup",
    ),
    _held_out("training", "eval_steps", "0", "{} == 0"),
    _held_out("training", "eval_on_start", "false", "!{}"),
    _held_out("training", "load_best_model_at_end", "false", "!{}"),
    _held_out("training", "early_stopping_patience", "0", "{} == 0"),
    Rule(
        at="spec",
        field="evaluation.perplexity_positions",
        holds=lambda self: not self.evaluation.perplexity_positions or self.stage in LANGUAGE,
        cel=f"size(self.evaluation.perplexity_positions) == 0 || self.stage in {list(LANGUAGE)}",
        accepted=f"none but with spec.stage: {' or '.join(LANGUAGE)}",
        remedy="remove them; finetune evaluate --perplexity-position tells them of any causal language model",
    ),
    _held_out("evaluation", "perplexity_positions", "none", "size({}) == 0", "them"),
    Rule(
        at="spec",
        field="evaluation.perplexity_positions",
        holds=lambda self: all(position < self.data.max_length for position in self.evaluation.perplexity_positions),
        cel="self.evaluation.perplexity_positions.all(p, p < self.data.max_length)",
        accepted="positions below spec.data.max_length",
        remedy="raise data.max_length, or remove what is not below it: nothing is longer",
    ),
    Rule(
        at="spec.evaluation",
        field="perplexity_positions",
        holds=lambda self: self.perplexity_positions == sorted(set(self.perplexity_positions)),
        cel=(
            "self.perplexity_positions.isSorted() && self.perplexity_positions.all(p, "
            "self.perplexity_positions.exists_one(q, q == p))"
        ),
        accepted="rising positions",
        remedy="write each once, the smallest first",
    ),
    Rule(
        at="spec.evaluation",
        field="prompts",
        holds=lambda self: all(self.prompts),
        cel="self.prompts.all(p, size(p) > 0)",
        problem="one of the prompts is empty",
        accepted="texts",
        remedy="remove the empty one",
    ),
    # ---- where it lies
    Rule(
        at="spec",
        field="output.uri",
        holds=lambda self: self.output.uri != self.model.uri,
        cel="self.output.uri != self.model.uri",
        accepted="another folder than spec.model.uri",
        remedy="choose a folder of its own: the model to start from would be overwritten",
    ),
    _claim("spec.output"),
    _claim("spec.checkpoint", optional=True),
    # ---- recovery
    _at_least("hangTimeout", "hang_timeout", "30s"),
    _at_least("startTimeout", "start_timeout", "1m"),
    _at_least("pendingTimeout", "pending_timeout", "10s"),
)


NEW_JOB = (
    "make a new FineTuneJob for another run; with spec.model.uri: job://NAME it starts from the output of this one"
)
IMMUTABLE: tuple[str, ...] = (
    "spec.stage",
    "spec.model",
    "spec.method",
    "spec.data",
    "spec.training",
    *(f"spec.{section}" for section in SECTIONS),
    "spec.evaluation",
    "spec.deepspeed",
    "spec.checkpoint.uri",
    "spec.checkpoint.resume",
    "spec.output",
)
"""What changes the result of a run, or where it lies: fixed once ``status.startTime`` is set.
What steers a run stays free: suspend, ttlSecondsAfterFinished, checkpoint.save_steps and save_total_limit,
workers, recovery, credentials, profile."""
