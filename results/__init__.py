"""Data of the project (reference cases, records, published numbers); read as package data, never imported for code."""
