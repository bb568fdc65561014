"""The operator: spec → plan → manifests → status. ``reconcile.py`` is the loop body, ``handlers.py`` its edge."""

__version__ = "0.1.0"
