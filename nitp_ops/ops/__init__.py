"""The public ops: each a function with its checks, its autograd and, where rows are chunked, its
loop."""
