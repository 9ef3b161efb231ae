"""Hostile files: one small module per kind, and the error that each input of the kind must get.

A module says in its first line what the kind is, and holds

- `ERROR`: a regular expression that the message matches;
- `INPUTS`: for each input, a function that turns the folder of a good model into a hostile one;
- `MODEL`, if the good model is another than `bert`: `gpt2`, `vit`, or `adapter` (LoRA on that BERT).

`python -m tests.hostile.NAME` prints what each input gets, and `python -m tests.hostile` the table in `tests/README.md`.
"""
