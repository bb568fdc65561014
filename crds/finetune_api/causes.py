"""Why an attempt ended. The trainer names what it knows in its termination message; the operator finds the
rest from exit codes, pod and node conditions. One table says which are tried again."""

from enum import StrEnum


class Retry(StrEnum):
    """What the operator does after a cause."""

    NEVER = "never"
    """A mistake that a restart would repeat."""
    COUNTED = "counted"
    """Restart, and count it against recovery.maxRestarts."""
    FREE = "free"
    """Restart; the infrastructure failed, not the run."""


class Cause(StrEnum):
    """``status.attempts[].cause``. Names are API."""

    SUCCEEDED = "Succeeded"
    SUSPENDED = "Suspended"
    # the user's
    INVALID_CONFIGURATION = "InvalidConfiguration"
    MODEL_NOT_FOUND = "ModelNotFound"
    DATA_NOT_FOUND = "DataNotFound"
    INVALID_DATA = "InvalidData"
    ACCESS_DENIED = "AccessDenied"
    CHECKPOINT_MISMATCH = "CheckpointMismatch"
    OUT_OF_GPU_MEMORY = "OutOfGPUMemory"
    NON_FINITE_LOSS = "NonFiniteLoss"
    # the run's
    OUT_OF_MEMORY = "OutOfMemory"
    OUT_OF_DISK = "OutOfDisk"
    TRAINER_ERROR = "TrainerError"
    KILLED = "Killed"
    STALLED = "Stalled"
    START_TIMEOUT = "StartTimeout"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    CLOCK_SKEW = "ClockSkew"
    ENDPOINT_UNAVAILABLE = "EndpointUnavailable"
    COMMUNICATION_ERROR = "CommunicationError"
    GPU_ERROR = "GPUError"
    NO_ACCELERATOR = "NoAccelerator"
    START_ERROR = "StartError"
    CONTAINER_ERROR = "ContainerError"
    UNKNOWN = "Unknown"
    # the infrastructure's
    EVICTED = "Evicted"
    PREEMPTED = "Preempted"
    POD_REJECTED = "PodRejected"
    NODE_LOST = "NodeLost"
    TERMINATED = "Terminated"
    JOB_DELETED = "JobDeleted"
    FENCED = "Fenced"
    NO_OTHER_NODE = "NoOtherNode"
    PARTLY_PLACED = "PartlyPlaced"


RETRY: dict[Cause, Retry] = {
    Cause.SUCCEEDED: Retry.NEVER,
    Cause.SUSPENDED: Retry.FREE,
    Cause.INVALID_CONFIGURATION: Retry.NEVER,
    Cause.MODEL_NOT_FOUND: Retry.NEVER,
    Cause.DATA_NOT_FOUND: Retry.NEVER,
    Cause.INVALID_DATA: Retry.NEVER,
    Cause.ACCESS_DENIED: Retry.NEVER,
    Cause.CHECKPOINT_MISMATCH: Retry.NEVER,
    Cause.OUT_OF_GPU_MEMORY: Retry.NEVER,
    Cause.NON_FINITE_LOSS: Retry.NEVER,
    Cause.OUT_OF_MEMORY: Retry.COUNTED,
    Cause.OUT_OF_DISK: Retry.COUNTED,
    Cause.TRAINER_ERROR: Retry.COUNTED,
    Cause.KILLED: Retry.COUNTED,
    Cause.STALLED: Retry.COUNTED,
    Cause.START_TIMEOUT: Retry.COUNTED,
    Cause.STORAGE_UNAVAILABLE: Retry.COUNTED,
    Cause.CLOCK_SKEW: Retry.COUNTED,
    Cause.ENDPOINT_UNAVAILABLE: Retry.COUNTED,
    Cause.COMMUNICATION_ERROR: Retry.COUNTED,
    Cause.GPU_ERROR: Retry.COUNTED,
    Cause.NO_ACCELERATOR: Retry.COUNTED,
    Cause.START_ERROR: Retry.COUNTED,
    Cause.CONTAINER_ERROR: Retry.COUNTED,
    Cause.UNKNOWN: Retry.COUNTED,
    Cause.EVICTED: Retry.FREE,
    Cause.PREEMPTED: Retry.FREE,
    Cause.POD_REJECTED: Retry.FREE,
    Cause.NODE_LOST: Retry.FREE,
    Cause.TERMINATED: Retry.FREE,
    Cause.JOB_DELETED: Retry.FREE,
    Cause.FENCED: Retry.FREE,
    Cause.NO_OTHER_NODE: Retry.FREE,
    Cause.PARTLY_PLACED: Retry.FREE,
}
