"""Makes batches for training of tokenized documents: which tokens are global, padding or packing, and their order."""
