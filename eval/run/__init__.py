"""One evaluation: a checkpoint asked through lmms-eval's plugin, and its record in the results folder."""
