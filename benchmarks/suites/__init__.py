"""Each module here is a suite of what is measured: cases with their providers."""
