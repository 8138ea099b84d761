"""How it is measured: times in turns, memory, errors, processes that may die, models of what a GPU
takes."""
