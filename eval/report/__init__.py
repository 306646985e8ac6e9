"""Results read back: one collection of rows, published figures, statistics, tables, plots and an HTML report."""
