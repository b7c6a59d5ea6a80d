"""Text: tokenizer, chat templates, and the choice of the next token."""
