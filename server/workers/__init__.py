"""HTTP workers (--http-workers): processes that answer HTTP on one port, for a main process that has the one queue."""
