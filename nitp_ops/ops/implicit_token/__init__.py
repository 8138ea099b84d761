"""implicit_token_loss: api -> autograd -> chunked -> the row kernels."""
