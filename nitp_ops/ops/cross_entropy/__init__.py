"""Cross-entropy of token targets: api -> term -> autograd -> chunked -> head_pass -> the row
kernel."""
