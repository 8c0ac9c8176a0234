"""Student models: split at the head, pruned from a teacher, adapted."""
