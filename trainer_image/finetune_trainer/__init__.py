"""The trainer: what runs in the worker pods. Start with ``run.py``, which reads top to bottom."""
