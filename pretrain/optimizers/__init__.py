"""Who learns and decays how, and the optimizers that torch lacks."""
