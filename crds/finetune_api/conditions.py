"""Types and reasons of the conditions, and the states of a job. They are API: never renamed."""

from enum import StrEnum


class Condition(StrEnum):
    """``status.conditions[].type``. Each says what holds when it is True."""

    ACCEPTED = "Accepted"
    """The spec has no mistakes and its profile exists."""
    INPUTS_READY = "InputsReady"
    """Every ``job://`` input has succeeded."""
    PODS_READY = "PodsReady"
    """All workers of the current attempt run."""
    PROGRESSING = "Progressing"
    """Steps are being finished."""
    SUSPENDED = "Suspended"
    """``spec.suspend`` is true and no pod is left."""
    RECONCILED = "Reconciled"
    """The operator's last pass over the job went through."""
    COMPLETE = "Complete"
    """The run has finished and its output is written."""
    FAILED = "Failed"
    """The run has failed for good."""
    READY = "Ready"
    """For kstatus (Flux, Argo CD, ``helm --wait``): the output is there."""
    STALLED = "Stalled"
    """For kstatus: it does not get on by itself; a person has to act."""
    HEALTHY = "Healthy"
    """Nothing makes the result doubtful. False does not end a run: it says what to look at. Judged by the trainer."""


class Reason(StrEnum):
    """``status.conditions[].reason``."""

    # Accepted
    VALID = "Valid"
    CHANGE_PENDING = "ChangePending"
    INVALID_SPEC = "InvalidSpec"
    UNKNOWN_PROFILE = "UnknownProfile"
    IMMUTABLE_FIELD_CHANGED = "ImmutableFieldChanged"
    # InputsReady
    NO_INPUTS = "NoInputs"
    INPUTS_FOUND = "InputsFound"
    WAITING_FOR_JOB = "WaitingForJob"
    INPUT_JOB_FAILED = "InputJobFailed"
    # PodsReady
    PODS_RUNNING = "PodsRunning"
    PODS_PENDING = "PodsPending"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_NOT_PULLED = "ImageNotPulled"
    CONTAINER_CONFIG_INVALID = "ContainerConfigInvalid"
    VOLUME_NOT_MOUNTED = "VolumeNotMounted"
    POD_NOT_STARTED = "PodNotStarted"
    QUOTA_EXCEEDED = "QuotaExceeded"
    QUEUED = "Queued"
    NO_PODS = "NoPods"
    NAME_TAKEN = "NameTaken"
    REFUSED = "Refused"
    PODS_TERMINATING = "PodsTerminating"
    # Progressing
    LOADING = "Loading"
    TRAINING = "Training"
    SAVING = "Saving"
    READING_RESULT = "ReadingResult"
    RESTARTING = "Restarting"
    BACKING_OFF = "BackingOff"
    NOT_RUNNING = "NotRunning"
    PROGRESS_UNKNOWN = "ProgressUnknown"
    PROGRESS_UNREACHABLE = "ProgressUnreachable"
    # Suspended
    SUSPEND_REQUESTED = "SuspendRequested"
    SUSPENDING = "Suspending"
    NOT_SUSPENDED = "NotSuspended"
    # Reconciled
    RECONCILED = "Reconciled"
    RECONCILE_ERROR = "ReconcileError"
    # Complete, Failed, Ready, Stalled
    FINISHED = "Finished"
    NOT_FINISHED = "NotFinished"
    RESTARTS_EXHAUSTED = "RestartsExhausted"
    NOT_RETRYABLE = "NotRetryable"
    NOT_FAILED = "NotFailed"
    RESULT_NOT_READ = "ResultNotRead"
    # Stalled
    NO_PROGRESS = "NoProgress"
    # Healthy
    NO_DOUBT = "NoDoubt"
    LOSS_AT_CHANCE = "LossAtChance"
    LOSS_ABOVE_START = "LossAboveStart"
    ZERO_GRADIENTS = "ZeroGradients"
    EMPTY_ANSWERS = "EmptyAnswers"
    IDENTICAL_ANSWERS = "IdenticalAnswers"
    ROWS_TRUNCATED = "RowsTruncated"
    HELD_OUT_ROWS_IN_TRAINING = "HeldOutRowsInTraining"
    TOO_FEW_STEPS = "TooFewSteps"
    OTHER_DOUBT = "OtherDoubt"


class State(StrEnum):
    """``status.state``: one word for people and printer columns. Never read to decide anything."""

    PENDING = "Pending"
    INVALID = "Invalid"
    WAITING = "Waiting"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RESTARTING = "Restarting"
    FINISHING = "Finishing"
    SUSPENDING = "Suspending"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
