"""Stands for the trainer in tests of the local cluster: steps that only sleep, and faults on request.

What it is to do stands in the JSON file ``$FAKE_TRAINER``; see ``Script`` in ``launch.py``.
"""
