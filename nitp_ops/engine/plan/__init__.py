"""How the terms of a spec run: what each weighs, which share a pass over a head, what they sum to."""
