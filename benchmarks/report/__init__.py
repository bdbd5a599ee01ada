"""Figures, pictures and the report of a GPU are made of the rows here."""
