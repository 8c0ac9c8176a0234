"""Where each operation of a bundle runs: predicted by rules, planned by Core ML, measured on a Mac. Never mixed."""
