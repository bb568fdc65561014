"""How things are named in a spec: URIs of models, data and storage, and names of Kubernetes objects.

``schema.PATTERNS`` has the words for each pattern.
"""

from typing import Annotated

from pydantic import Field

JOB = r"job://[a-z]([-a-z0-9]*[a-z0-9])?"
MODEL_URI = rf"^((hf|s3|gs|az|pvc)://[^/]+.*|file:///.+|{JOB})$"
DATA_URI = rf"^({JOB}|(hf|s3|gs|az|pvc)://[^/]+.*|file:///.+)$"
STORAGE_URI = r"^((s3|gs|az|pvc)://[^/]+.*|file:///.+)$"
NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"

Uri = Annotated[str, Field(max_length=1024)]
ModelUri = Annotated[Uri, Field(pattern=MODEL_URI)]
DataUri = Annotated[Uri, Field(pattern=DATA_URI)]
StorageUri = Annotated[Uri, Field(pattern=STORAGE_URI)]
Name = Annotated[str, Field(max_length=253, pattern=NAME)]
