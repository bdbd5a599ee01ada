"""What is made of the rows: figures, pictures, and the report of a GPU."""
