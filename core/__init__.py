"""The shared core of dtl: see README.md in this folder."""
