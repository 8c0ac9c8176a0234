"""Teachers: what they say about a batch, whoever and wherever they are."""
