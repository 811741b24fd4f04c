"""Accuracy of sparse attention: policies, tasks, runs and plots. The command line is ``quest-eval``."""
