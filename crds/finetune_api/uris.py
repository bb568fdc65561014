"""How a spec writes where something lies. ``schema.PATTERNS`` has the words for each pattern."""

from typing import Annotated

from pydantic import Field

Uri = Annotated[str, Field(max_length=1024)]
MODEL_URI = r"^((hf|s3|gs|az|pvc)://[^/]+.*|file:///.+|job://[a-z]([-a-z0-9]*[a-z0-9])?)$"
DATA_URI = r"^((hf|s3|gs|az|pvc)://[^/]+.*|file:///.+)$"
STORAGE_URI = r"^((s3|gs|az|pvc)://[^/]+.*|file:///.+)$"

ModelUri = Annotated[Uri, Field(pattern=MODEL_URI)]
DataUri = Annotated[Uri, Field(pattern=DATA_URI)]
StorageUri = Annotated[Uri, Field(pattern=STORAGE_URI)]
