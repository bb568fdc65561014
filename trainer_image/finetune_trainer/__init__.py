"""The trainer: what runs in the worker pods. Start with ``run.py``, which reads top to bottom."""

import logging
import warnings

# What libraries say to their developers looks like an error to whoever waits for a result. Some of it is said on
# import, so this stands before any.
warnings.simplefilter("ignore", FutureWarning)
warnings.simplefilter("ignore", DeprecationWarning)
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # optional kernels that are not there
