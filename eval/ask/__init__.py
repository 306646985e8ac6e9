"""One question to the baseline and to a method, side by side: answers, costs, and what was kept of the image."""
