"""From files that people have to batches of tokens: records, rendering with loss weights and spans, fixed shapes."""
