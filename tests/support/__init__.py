"""What the tests share: the reference, the ranks, arrays and their comparison, stand-ins for libraries."""
