"""python -m benchmarks.serving: this server under load, beside what people would otherwise use."""
