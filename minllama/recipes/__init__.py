"""Chapters joined: one file a job, the bodies of the `minllama` command."""
