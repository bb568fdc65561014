"""The command line: ``finetune``, also reachable as ``kubectl finetune``."""
