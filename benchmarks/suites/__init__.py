"""What is measured: each module is a suite of cases with their providers."""
