"""Implements the command ``led``, which reads documents and writes results."""
