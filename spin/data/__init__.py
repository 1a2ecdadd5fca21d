"""From a data set to batches of token ids. In the order to read:
rows.py       a file, a folder or a hub id → rows → pairs (prompt, real answer)
text.py       text ↔ token ids, and where the prompt ends and the answer begins
selection.py  which rows are used; those left out are counted by reason
pairs.py      the pairs of an iteration as token ids, in batches and micro-batches"""
