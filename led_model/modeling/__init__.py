"""Defines the model: embeddings, attentions, layers, encoder, decoder and heads, and what a forward returns."""
