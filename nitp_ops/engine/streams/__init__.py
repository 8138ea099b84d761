"""What a forward pass offers to the objectives, and which rows of it have a target."""
