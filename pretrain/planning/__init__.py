"""Memory, time and cost of a run, foreseen without a GPU."""
