"""Speed, memory and their floors of methods on models of any shape."""
