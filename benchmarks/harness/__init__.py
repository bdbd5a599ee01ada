"""How it is measured: shapes, cases and suites, the runner, the gate, memory, figures, and the tables of rows."""
