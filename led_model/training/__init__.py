"""Fine-tunes models by transformers' Trainer, in a directory that an interrupted run goes on from."""
