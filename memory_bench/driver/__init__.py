"""Reads episodes with a model, asks, trains, and meters all of it."""
