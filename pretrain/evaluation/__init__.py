"""Held-out loss, answers and tasks of lm-eval, of one checkpoint or several."""
