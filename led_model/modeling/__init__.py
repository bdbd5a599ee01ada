"""The model: embeddings, attentions, layers, stacks and heads, and what a forward pass returns."""
