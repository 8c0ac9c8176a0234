"""The embedded tool-calling world: a generator of conversations, its tokenizer and a small teacher."""
