"""Files in a folder or an object store: reading, atomic writes, retries, uploads."""
