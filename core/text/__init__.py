"""Parts of the text actor: detokenising, stop strings, the ledger, admission, chat messages, the tokenizer worker."""
