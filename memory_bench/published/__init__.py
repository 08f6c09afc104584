"""What papers report and claim, as data."""
