"""Writes sequences with a model: its cache, one step, the scores' rules, and the searches.

Nothing here imports the model, of which :mod:`led_model.generation.model_protocol` says what it must offer.
"""
