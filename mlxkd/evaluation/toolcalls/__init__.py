"""Tool calls in text: finding them as they are written, judging them, and BFCL's rules."""
