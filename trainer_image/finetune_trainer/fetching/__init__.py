"""What ``fetch.py`` brings things with: which files, from the hub, and how they are kept."""
