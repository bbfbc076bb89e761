"""dsd-serve: the HTTP server."""
