"""Files in local folders and object stores: reads, atomic writes, retries, uploads, locks."""
