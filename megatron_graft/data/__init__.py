"""Text in, samples out: corpus, tokenizer, ``.bin/.idx`` data sets, and what training reads from them."""
