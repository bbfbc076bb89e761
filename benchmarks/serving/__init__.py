"""python -m server.bench: this server under load, beside what people would otherwise use."""
