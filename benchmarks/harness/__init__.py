"""How it is measured: shapes, cases, the runner, the gate, memory, and the table of rows."""
