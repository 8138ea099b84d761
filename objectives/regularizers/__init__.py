"""Terms that shape the hidden states themselves, towards no target."""
