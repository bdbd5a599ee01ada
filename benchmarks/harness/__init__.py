"""This package measures: shapes, cases and suites, the runner, the gate, memory, figures, and the tables of rows."""
