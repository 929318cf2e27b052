"""The parts of train_speed.py, in the order in which they run.

cases.py         the rows as token ids, the batches and the adapter to begin from, once for everyone     (Burnish's environment)
environments.py  one virtual environment for each peer, from a lock in ../environments
contestants.py   the table of who runs, and how
launch.py        one process, alone: time, memory, the loss of each step
recorder.py      what a peer's script writes while it trains (standard library only)
run_plain.py     a loop over transformers + PEFT
run_trl.py       TRL's SFTTrainer; run_unsloth.py: the same trainer behind Unsloth's door; sft.py: what they have in common
held_out.py      the loss of each adapter on rows nobody trained on, by one code for everyone            (the plain environment)
summary.py       medians, ratios within a round, the RESULT line, JSON and a table
"""
