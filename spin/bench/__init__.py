"""The paper's benchmarks (Tables 3 to 6): evaluate.py --tasks.

harness.py runs them by the package lm_eval, which is imported there and nowhere else.
paper_tables.py holds the paper's numbers and puts ours above them; read it second.
"""
