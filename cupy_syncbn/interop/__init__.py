"""Synchronized batch normalization within other libraries; each is imported only when asked for."""
