"""The status of a FineTuneJob: what the operator writes, and ``kubectl get`` shows."""

from pydantic import Field

from finetune_api.base import KubeModel


class ConditionStatus(KubeModel):
    """One condition, as in Kubernetes' own objects."""

    type: str = Field(max_length=316)
    """Accepted, InputsReady, PodsReady, Progressing, Suspended, Reconciled, Complete, Failed, Ready, Stalled,
    Healthy."""
    status: str = Field(pattern="^(True|False|Unknown)$")
    """True, False or Unknown."""
    reason: str = Field(max_length=1024)
    """One word for programs."""
    message: str = Field("", max_length=32768)
    """For people."""
    last_transition_time: str = Field(json_schema_extra={"format": "date-time"})
    """When the status last changed."""
    observed_generation: int | None = None
    """The metadata.generation this was found for."""


class ProgressStatus(KubeModel):
    """Where the run stands."""

    phase: str = ""
    """What the trainer is doing: loading, preparing, training, generating, judging, evaluating, saving,
    exporting, done."""
    step: int = 0
    """Optimizer steps finished."""
    max_steps: int = 0
    """Optimizer steps in all."""
    percent: str = ""
    """Share of the steps, e.g. 62 %."""
    epoch: str = ""
    """Passes over the training rows, e.g. 1.25."""
    loss: str = ""
    """Loss of the last logged step."""
    learning_rate: str = ""
    """Learning rate of the last logged step."""
    grad_norm: str = ""
    """L2 norm of the gradients before clipping."""
    tokens_per_second: str = ""
    """Useful tokens per second over all workers."""
    mfu: str = ""
    """Model FLOPs utilisation, 0 to 1."""
    eta: str = ""
    """Time to the end, e.g. 1h12m."""
    last_step_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    """When the last step ended."""
    updated_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    """When the operator last heard of the trainer."""
    message: str = ""
    """What the trainer says it is doing."""


class GPUStatus(KubeModel):
    """GPUs of the workers."""

    wanted: int = 0
    """Those that all workers of a job that is to run ask for."""
    held: int = 0
    """Those of pods that have a node, and have not ended."""


class CheckpointStatus(KubeModel):
    """One complete checkpoint."""

    step: int
    """Optimizer steps it holds."""
    uri: str
    """Where it lies."""
    digest: str = ""
    """SHA-256 of its manifest, which lists size and SHA-256 of every file."""
    size: str = ""
    """Bytes of all its files, e.g. 18.4Mi."""
    time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    """When it was completed."""


class AttemptStatus(KubeModel):
    """One life of the gang of workers, from creation to its end."""

    number: int
    """From 1."""
    job_name: str = ""
    """The batch Job of this attempt."""
    start_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    """When the Job was made."""
    end_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    """When it was found to have ended; unset while it runs."""
    cause: str = ""
    """Why it ended, one word (see the table of causes in the documentation)."""
    exit_code: int | None = None
    """Exit code of the process that ended first; negative: killed by that signal."""
    message: str = ""
    """What happened, and the remedy where there is one."""
    counted: bool = False
    """Whether it counts against recovery.maxRestarts."""
    pod: str = ""
    """The pod that failed first."""
    node: str = ""
    """The node it ran on."""
    node_suspect: bool = False
    """The node is kept out of the next attempt."""
    resumed_from_step: int | None = None
    """The checkpoint it continued from; unset: from the start."""
    last_step: int = 0
    """The last step known of it."""
    log: list[str] = []
    """Last lines of the failed pod's log."""


class OutputStatus(KubeModel):
    """A written result."""

    uri: str
    """Where it lies."""
    kind: str = ""
    """adapter, model, merged, or data: rows for another job."""
    digest: str = ""
    """SHA-256 of its manifest."""
    size: str = ""
    """Bytes of all its files, e.g. 18.4Mi."""


class FineTuneJobStatus(KubeModel):
    """What the operator knows of the job."""

    observed_generation: int | None = None
    """The metadata.generation this status was made for; -1: not seen yet."""
    state: str = ""
    """Pending, Invalid, Waiting, Queued, Starting, Running, Restarting, Finishing, Suspending, Suspended, Succeeded,
    Failed: for people; programs read the conditions."""
    message: str = ""
    """What it does or waits for, or how it ended, in a line; the conditions say more."""
    conditions: list[ConditionStatus] = Field(
        default=[], json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}
    )
    """The conditions."""
    start_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    """When the first attempt was made. From then on what changes the result is immutable."""
    completion_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    """When the job succeeded or failed for good."""
    plan_digest: str = ""
    """SHA-256 of the resolved configuration the run was started with (ConfigMap NAME-config)."""
    progress: ProgressStatus | None = None
    """Where the run stands."""
    gpus: GPUStatus | None = None
    """Its GPUs."""
    checkpoints: list[CheckpointStatus] = []
    """Complete checkpoints, oldest first."""
    last_checkpoint_time: str | None = Field(None, json_schema_extra={"format": "date-time"})
    """When the newest checkpoint was completed."""
    restarts: int = 0
    """Restarts so far, for whatever cause."""
    counted_restarts: int = 0
    """Restarts that count against recovery.maxRestarts."""
    attempts: list[AttemptStatus] = []
    """The attempts, the newest last; at most the last twenty are kept."""
    outputs: list[OutputStatus] = []
    """What was written."""
    evaluation: dict[str, str] = {}
    """Last evaluation figures, e.g. loss and perplexity."""
    trainable_parameters: int | None = None
    """Parameters that are trained."""
    total_parameters: int | None = None
    """Parameters of the model, the trained ones included."""
