"""What runs did, as one page (`page.py`), and grids of runs side by side (`compare.py`)."""
