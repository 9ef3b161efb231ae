"""Hostile files: one small module per kind, and the error that each input of the kind must get.

A module says in its first line what the kind is, and holds

- `SAYS`: an error of one of its inputs, for the table;
- `ERROR`: a regular expression that the error of each input matches;
- `INPUTS`: for each input, a function that turns the folder of a good model into a hostile one;
- `MODEL`, if the good model is another than `bert`: `gpt2`, `vit`, or `adapter` (LoRA on that BERT).

`python -m tests.hostile.NAME` prints what each input gets; `python -m tests.hostile.kit --table` prints the table in
`tests/README.md`.
"""
