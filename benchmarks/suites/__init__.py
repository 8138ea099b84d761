"""What is measured: every op against everybody, and the cases that bring their own measurement."""
