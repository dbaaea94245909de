"""The two stages of distillation and the gate between them, as commands and as functions."""
