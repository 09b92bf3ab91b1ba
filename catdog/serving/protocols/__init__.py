"""Wire protocols: each turns requests into calls of the one service, and its answers into responses."""
