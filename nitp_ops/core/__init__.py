"""What every op uses and knows of no op: argument checks, chunking, GEMMs, dispatch, the compiled
library."""
