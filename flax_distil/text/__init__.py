"""Text: token ids and prompts (`tokens`), normalisers (`normalize`), error rates (`wer`)."""
