"""Parts of tools/train_demo.py: corpus, tokenizer, chat examples, network, export; never installed."""
