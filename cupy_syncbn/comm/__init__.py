"""Ranks: their groups, their messages, and their errors."""
