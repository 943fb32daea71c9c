"""What a run shows: TensorBoard, the terminal, pictures."""
