"""What several mechanisms share: checks, the softmax, tiles of space, chunked recurrences, ranges of clusters."""
