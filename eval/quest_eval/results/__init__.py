"""Results of a run: the journal of finished samples, the cells made of it, and tables of these."""
