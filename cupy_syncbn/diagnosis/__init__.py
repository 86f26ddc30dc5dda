"""The report: packages, GPUs, transports, and whether they work together."""
