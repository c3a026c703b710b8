"""The commands: each file is a thin entry point over `pretrain`."""
