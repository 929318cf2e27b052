"""Burnish fine-tunes a language model on your own data and proves whether that helped."""
