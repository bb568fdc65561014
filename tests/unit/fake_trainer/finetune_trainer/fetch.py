"""The init container: fails where the model is not there, as the real one does."""

import json
import os
import sys
from pathlib import Path

uri = json.loads(Path(os.environ["FINETUNE_CONFIG"]).read_text())["model"]["uri"]
print(f"fetching {uri} into {os.environ['FINETUNE_CACHE']}")
if not Path(uri.removeprefix("file://")).exists():
    word = {"cause": "ModelNotFound", "message": f"There is no {uri}.", "exit_code": 64}
    Path(os.environ["FINETUNE_TERMINATION_LOG"]).write_text(json.dumps(word))
    sys.exit(64)
