"""Published claims, tested here."""
