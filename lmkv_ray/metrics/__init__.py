"""Every metric of the cache, declared once."""
