"""The loop, and what surrounds it: a run's start, records, faults and end."""
