"""Models on disk and on the hub: files, names of tensors, smaller weights."""
