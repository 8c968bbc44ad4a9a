"""What several mechanisms share: checks, the softmax, tiles of space, chunks of time, ranges of clusters."""
