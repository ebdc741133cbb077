"""What `against_trl.py` is made of: rows, the work of both sides, an arm for each side, pairs of them, their summary."""
