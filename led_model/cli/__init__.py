"""The command ``led``: documents in, results out."""
