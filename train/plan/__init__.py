"""What a recipe will take (`plan.py`), and its activations by technique (`combinations.py`)."""
