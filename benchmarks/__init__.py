"""What coldtap costs, measured against the plain code that it replaces: `make bench`, or `python -m benchmarks`."""
