"""One decode engine for every backend: sessions, sampling, speculation, prompt cache, batches."""
