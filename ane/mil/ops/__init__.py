"""The operations of MIL. Each module of this package registers its own when it is imported."""
