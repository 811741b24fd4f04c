"""The commands of ``quest-eval``: demo, run, advise."""
