"""The chart, its alerts and dashboards, and what lies in gitops/."""
