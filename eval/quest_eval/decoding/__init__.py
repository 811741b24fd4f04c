"""A model decodes behind a long context under any policy."""
