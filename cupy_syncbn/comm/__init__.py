"""Ranks: groups of them, their messages, and what they say of each other's faults."""
