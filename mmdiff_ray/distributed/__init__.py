"""The code that needs Ray: clusters, data streaming, training workers, launch and progress display."""
