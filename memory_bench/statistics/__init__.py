"""Intervals, pairs, half-lives, effects, and whether anything was learned."""
