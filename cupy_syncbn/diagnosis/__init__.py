"""What is installed, which GPU and transport each rank has, and whether they work together."""
