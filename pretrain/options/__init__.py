"""Every option of a config, the rules between them, and what follows from them alone: batches, phases, rates, sizes."""
