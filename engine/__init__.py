"""How anything runs on one or many devices: launch, fit loop, checkpoints, configuration, evaluation loops."""
