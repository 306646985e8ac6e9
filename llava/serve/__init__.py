"""LLaVA for people and for production: a chat at the command line, and reduced images inside vLLM."""
