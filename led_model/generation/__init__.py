"""How a model writes: its cache, one step, the scores' rules, and the searches. Nothing here imports the model."""
