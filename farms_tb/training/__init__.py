"""The callbacks of Lightning and Hugging Face: when to measure, and what to log where."""
