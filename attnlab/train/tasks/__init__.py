"""Tasks: where batches come from, and what a model's answer to one is worth. One module per modality."""
