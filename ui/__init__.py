"""dsd-ui: a page in the browser, as a client of the HTTP API."""
