"""What sparse attention keeps and loses: tasks, policies, runs and pictures. Needs ``quest_ops[demo]``."""
