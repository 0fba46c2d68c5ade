"""Say what a benchmark measured: summaries, tables, pages and plots of its results."""
