"""Makes checkpoints that read long texts of those that read short ones, tensor by tensor."""
